"""What YAML files and `key=value` words say, read as dataclasses: OmegaConf's structured configs know the types."""

import dataclasses
import itertools
import math
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ba_lora.errors import UserError
from ba_lora.words import YAML_WORDS, check_keys, nearest

T = TypeVar("T")
WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}


def read_mapping(kind: type[T], raw: Any, *, where: object, **given: Any) -> T:
    """Return the dataclass `kind` with what a mapping of a file sets; a key that is null counts as absent.

    given: fields that the file does not set under their names, such as the key at which the mapping stands.
    Raises UserError, naming `where` and the key, for no mapping, an unknown or missing key and a value of another type.
    """
    known = [entry.name for entry in dataclasses.fields(kind) if entry.init and entry.name not in given]
    check_keys(raw, known, where=where)
    of = {entry.name: entry.type for entry in dataclasses.fields(kind)}
    for key, value in raw.items():
        if (hint := misfit(of[key], value)) is not None:
            raise UserError(f"{_told(f'{where}: ', key, value)}: {_wanted(of[key])} is needed{hint}")
    values = {key: _text_keys(value) for key, value in raw.items() if value is not None}
    return _read(kind, values | given, f"{where}: ")


def read_typed(kind: type[T], words: Sequence[str], *, further: Iterable[str] = ()) -> tuple[T, dict[str, str]]:
    """Return the dataclass `kind` with what `key=value` words set, and the texts of those whose key is in `further`.

    Read are fields of bool, int, float and str, and of these or None (`none`, `null` or nothing). Raises UserError for
    an unknown key (with the nearest) or a bad value.
    """
    of = {entry.name: _kinds(entry.type) for entry in dataclasses.fields(kind)}
    known = [name for name, kinds in of.items() if {*kinds} <= {*WANTED, type(None)}]
    keys = [*known, *further]
    values: dict[str, str | None] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in keys:
            raise UserError(f"unknown option {word!r}{nearest(key, keys)}; keys: {', '.join(keys)}")
        is_none = type(None) in of.get(key, ()) and text.lower() in ("", "none", "null")
        values[key] = None if is_none else text
    refuse_interpolations(values, "the command line")  # of files read_yaml does
    own = {key: values.pop(key) for key in list(values) if key in known}
    return _read(kind, own, ""), typing.cast(dict[str, str], values)


def refuse_interpolations(value: Any, source: object, key: str = "") -> None:
    """Raise UserError for a `${…}`: it could bring what the environment holds into configs, results and model cards."""
    if isinstance(value, dict | list):
        for name, entry in value.items() if isinstance(value, dict) else enumerate(value):
            refuse_interpolations(name, source, key)
            refuse_interpolations(entry, source, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and "${" in value:
        raise UserError(f"{key or value} in {source}: ${{…}} is not read in configs: write the value itself")


def _read(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    empty = OmegaConf.structured(kind)
    OmegaConf.set_readonly(empty, False)  # of a frozen class
    found, of = empty, {entry.name: entry.type for entry in dataclasses.fields(kind)}
    for key, value in values.items():  # one by one, since OmegaConf does not say which a list's entry belongs to
        try:
            found = OmegaConf.merge(found, {key: value})
        except (OmegaConfBaseException, TypeError) as error:
            raise UserError(f"{_told(where, key, value)}: {_wanted(of[key])} is needed") from error
    if missing := sorted(OmegaConf.missing_keys(found)):
        raise UserError(f"{where}{' and '.join(missing)} is missing")
    read = OmegaConf.to_object(found)
    for key in values:
        value = getattr(read, key)
        parts = vars(value).values() if dataclasses.is_dataclass(value) else value
        parts = parts if isinstance(parts, Collection) else (parts,)
        if any(isinstance(part, float) and not math.isfinite(part) for part in parts):
            raise UserError(f"{_told(where, key, values[key])}: a finite number is needed")
        if isinstance(value, tuple) and typing.get_args(of[key])[:1] == (str,):  # OmegaConf lets a list through
            if not all(isinstance(word, str) for word in value):
                raise UserError(f"{_told(where, key, values[key])}: {_wanted(of[key])} is needed")
    return read


def misfit(annotation: Any, value: Any) -> str | None:
    """Return a hint (or nothing) where a value, or one within it, is no word and a word is wanted, None where all fit.

    OmegaConf would take `True` for a word that YAML reads as true, and let a list within a list pass.
    """
    kinds = _kinds(annotation)
    inner = next((typing.get_args(one) for one in kinds if typing.get_origin(one) in (list, tuple, dict)), ())
    if isinstance(value, Mapping) and len(inner) == 2:
        parts = [(one, part) for pair in value.items() for one, part in zip(inner, pair, strict=True)]
    elif isinstance(value, list | tuple) and inner:
        parts = [(inner[0], part) for part in value]
    elif str not in kinds or bool in kinds:
        return None
    elif isinstance(value, bool):
        return f"; {YAML_WORDS}"
    else:
        return "" if isinstance(value, Mapping | list | tuple) else None
    return next((hint for hint in itertools.starmap(misfit, parts) if hint is not None), None)


def _told(where: str, key: str, value: Any) -> str:
    return f"{where}{key}: {value}" if where else f"{key}={value}"  # as it stands in a file, or as it was typed


def wanted_at(kind: type, key: str) -> str | None:
    """Return in words what the field at a dotted key takes; None where OmegaConf's own words must do."""
    *sections, name = key.split(".")
    for section in sections:
        kind = {entry.name: entry.type for entry in dataclasses.fields(kind)}.get(section)
        if not dataclasses.is_dataclass(kind):
            return None
    annotation = {entry.name: entry.type for entry in dataclasses.fields(kind)}.get(name)
    return None if annotation in (None, Any) or dataclasses.is_dataclass(annotation) else _wanted(annotation)


def _wanted(annotation: Any) -> str:
    """Return what a field takes, in words: `tuple[int, ...]` is a list, each a whole number."""
    one = next(one for one in _kinds(annotation) if one is not type(None))
    if one in WANTED:
        return WANTED[one]
    word = "a list" if typing.get_origin(one) in (tuple, list) else "a mapping"
    inner = [each for each in typing.get_args(one) if each in WANTED or typing.get_origin(each)]
    if len(inner) < (1 if word == "a list" else 2):
        return word
    return f"{word}, each {_wanted(inner[-1]).removesuffix(',')},"


def _text_keys(value: Any) -> Any:
    return {str(key): entry for key, entry in value.items()} if isinstance(value, dict) else value


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a field: `int | None` has two."""
    return typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
