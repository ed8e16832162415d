"""Reading a configuration: base file + method file + `key=value`, three flat layers merged into the dataclasses.

    configs/nlg/<model>.yaml        the base: model, data, trainer, evaluation
    configs/methods/<method>.yaml   only what differs, with `nlg:` and `nlu:` blocks where the two differ; `variants:`
                                    are methods by other names: some `terms` only, or other settings
    key=value                       typed by hand, e.g. `regularizers.lambda_svd=0 trainer.max_steps=20`

NLU has a fourth between the first two, the task's settings. What a configuration holds: schema.py, schema_nlg.py and
schema_nlu.py; which values go together: checks.py.
"""

import copy
import dataclasses
import functools
import pickle
import re
import typing
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ba_lora.config.checks import check_config, check_typed_keys
from ba_lora.config.schema import RunConfig
from ba_lora.config.schema_nlg import NLGConfig
from ba_lora.config.schema_nlu import NLUConfig, section_of, task_layer, with_labels
from ba_lora.config.structured import misfit, refuse_interpolations, wanted_at
from ba_lora.config.trainer import ALIASES, argument_types, nearest_argument, normalized
from ba_lora.errors import UserError
from ba_lora.paths import PROJECT_ROOT, resolve_path
from ba_lora.words import check_choice, nearest, take_options

METHODS_PATH = PROJECT_ROOT / "configs" / "methods"
SCHEMAS: dict[str, type[RunConfig]] = {schema.kind: schema for schema in (NLGConfig, NLUConfig)}


def load_config(
    config_path: str | Path,
    *,
    method: str | None = None,
    task: str | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    kind: str | None = None,
    checked: bool = True,
) -> RunConfig:
    """Merge base, task (NLU), method and overrides into a checked `NLGConfig` or `NLUConfig`.

    `config_path` may be a base (then `method` defaults to ba_lora) or a resolved config saved with a run (which
    already names its method). `kind`, nlg or nlu, picks the method's block of that name; None: as the file says.
    `checked=False`, for a run that is only read: its values need not be those that may be trained here today.
    Raises UserError for anything wrong.
    """
    path = find_config(config_path, kind=kind)
    base = read_yaml(path)
    for folder, instead in (("methods", "give a base, and method=NAME"), ("tables", "sh scripts/reproduce.sh NAME")):
        if path.parent == PROJECT_ROOT / "configs" / folder:
            raise UserError(f"{path} is no base but one of the {folder}: {instead}")
    kind = _kind_of(base, kind, path)
    typed, overrides = take_options(overrides, ("method", "task", "nlu.task"))
    method = _the_one("method", {"method=": typed.get("method"), "--method ": method})
    task = _the_one("task", {**{f"{key}=": typed.get(key) for key in ("task", "nlu.task")}, "--task ": task})
    task = _typed_task(task)
    if kind == "nlg" and task is not None:
        raise UserError(f"task={task} is for NLU (sh scripts/nlu.sh); what is evaluated here is eval.tasks=[NAME]")
    if "method" in base:
        described = section_of(base, "nlu").get("task")
        described = described.get("name") if isinstance(described, dict) else described
        saved = {"method": base["method"], "task": described}
        if isinstance(task, dict):
            raise UserError(
                f"{path} is the resolved config of a run, with its task: leave nlu.task out, or start from a base"
            )
        for name, wanted in (("method", method), ("task", task)):
            if wanted not in (None, saved[name]):
                raise UserError(
                    f"{path} is the resolved config of {name} {saved[name]}: "
                    f"leave {name} {wanted} out, or start from a base in configs/{kind}"
                )
        layers = [_without_refused(base, SCHEMAS[kind])]
    else:
        method = "ba_lora" if method is None else method
        layers = [base, _method_layer(method, kind), {"method": method, "name": path.stem}]
        if kind == "nlu":
            layers.insert(1, task_layer(base, task))
    typed_layer = override_layer(overrides)
    for layer in layers:
        _refuse_untyped(layer, path, typed_layer, saved="method" in base)
    layers.append(typed_layer)
    schema = SCHEMAS[kind]
    for layer in layers:
        _refuse_unknown(layer, path, schema, schema)
    try:
        config = _of_values(schema, _typed(schema, functools.reduce(_overlay, layers)))
    except OmegaConfBaseException as error:
        typed_there = any(text.startswith(f"{error.full_key}=") for text in overrides)
        source = "the command line" if typed_there else path
        key = error.full_key or ""
        if wanted := wanted_at(schema, key):
            value = functools.reduce(lambda node, part: node[part], key.split("."), functools.reduce(_overlay, layers))
            told = f"{value}: {wanted} is needed"
        else:
            value, told = None, str(error).splitlines()[0]
        several = "; one seed a run: scripts/ba-lora.sh and nlu.sh take seed=1,2, reproduce.sh takes seeds=[1,2]"
        is_seeds = error.full_key == "seed" and ("," in str(value) or isinstance(value, list))
        raise UserError(f"{error.full_key} in {source}: {told}{several if is_seeds else ''}") from error
    config.trainer = normalized(config.trainer)
    if isinstance(config, NLUConfig):
        config = with_labels(config)
    if checked:
        check_config(config)
        check_typed_keys(typed_layer, config)
    return config


def _the_one(what: str, words: dict[str, str | None]) -> str | None:
    """Return what was typed in one of these words or in several alike, None where it was in none."""
    given = {word: value for word, value in words.items() if value is not None}
    if len(set(given.values())) > 1:
        told = " and ".join(f"{word}{value}" for word, value in given.items())
        raise UserError(f"{told} are two {what}s: give one")
    return next(iter(given.values()), None)


def _typed_task(task: str | None) -> str | dict[str, Any] | None:
    """Return a task as it was typed: its name, or the mapping that describes one of your own."""
    return override_layer([f"task={task}"])["task"] if task is not None and task.lstrip().startswith("{") else task


def load_run(run_path: Path) -> RunConfig:
    """Return the config saved with a run, that folder being the run's. This machine may lack what the run used."""
    config = load_config(run_path / "config.yaml", checked=False)
    return dataclasses.replace(config, output_dir=str(run_path.absolute()))


def config_of_result(plain: dict[str, Any], *, kind: str) -> RunConfig:
    """Return the config that a result keeps (ba_lora/runs/results.py). Raises UserError for what no config may hold."""
    refuse_interpolations(plain, "a result's config")
    try:
        return OmegaConf.to_object(OmegaConf.merge(_structured(SCHEMAS[kind]), _without_refused(plain, SCHEMAS[kind])))
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def _without_refused(plain: dict[str, Any], schema: type[RunConfig], prefix: str = "") -> dict[str, Any]:
    """Return what was saved with a run without the keys that are refused now: they had no effect on it."""
    return {
        key: _without_refused(value, schema, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in plain.items()
        if f"{prefix}{key}" not in schema.refused
    }


def find_config(name: str | Path, *, kind: str | None) -> Path:
    """Return the absolute path of a config: a file (see `resolve_path`), or a name in configs/<kind>, such as toy."""
    path = resolve_path(name)
    if path.is_file() or len(Path(name).parts) > 1:
        return path
    stem = Path(name).stem if Path(name).suffix in (".yaml", ".yml") else str(name)
    found = {folder: PROJECT_ROOT / "configs" / folder / f"{stem}.yaml" for folder in (kind or "nlg", *SCHEMAS)}
    return next((file for file in found.values() if file.is_file()), path)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML config. Raises UserError for a missing, broken or empty file."""
    if not path.is_file():
        files = sorted((PROJECT_ROOT / "configs").glob("nl?/*.yaml"))
        known = {file.stem: None for file in files} | {str(file): None for file in files}
        if path.name in valid_keys(NLGConfig) + valid_keys(NLUConfig):
            raise UserError(f"{path.name} is a key: write {path.name}=VALUE, without blanks")
        asked = path.stem if path.parent == PROJECT_ROOT else str(path.absolute())
        raise UserError(f"no such config: {path.absolute()}{nearest(asked, list(known))}")
    status = path.stat()
    return copy.deepcopy(_parsed(path.absolute(), status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=256)  # a table reads the same few files hundreds of times; a changed file is read again
def _parsed(path: Path, modified_ns: int, size: int) -> dict[str, Any]:
    try:
        plain = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # PyYAML and OmegaConf raise unrelated classes; all of them mean a broken file
        raise UserError(f"{path} is not a valid YAML config: {_yaml_fault(error)}") from error
    if not isinstance(plain, dict) or not plain:
        raise UserError(f"{path} is empty or no mapping: a config is `key: value` lines")
    refuse_interpolations(plain, path)
    return plain


def _yaml_fault(error: Exception) -> str:
    """Return what PyYAML says is wrong, and in which line, without what it was doing."""
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {error.problem}" if mark else str(error).splitlines()[0]


def only_typed(layer: dict[str, Any]) -> dict[str, Any]:
    """Return what a layer sets of the keys that count only when they are typed: dotted key → its value."""
    sections = {"model.trust_remote_code": layer.get("model"), "overwrite": layer}
    names = {key: key.rpartition(".")[2] for key in sections}
    return {k: v[names[k]] for k, v in sections.items() if isinstance(v, dict) and names[k] in v}


def _refuse_untyped(layer: dict[str, Any], path: Path, typed: dict[str, Any], *, saved: bool) -> None:
    """Take what counts only when it is typed out of a file's layer; raise UserError where a base sets it."""
    for key, value in only_typed(layer).items():
        section, _, name = key.rpartition(".")
        (layer[section] if section else layer).pop(name)
        if value not in (False, None) and not saved and key not in only_typed(typed):
            raise UserError(f"{key} in {path} counts only when it is typed: take it out, and type {key}=true")


def valid_keys(node: Any = NLGConfig, prefix: str = "") -> list[str]:
    """Return every dotted key a configuration may have (free-form sections by their own name only)."""
    keys = []
    for entry in dataclasses.fields(node):
        keys.append(prefix + entry.name)
        if dataclasses.is_dataclass(entry.type):
            keys += valid_keys(entry.type, f"{prefix}{entry.name}.")
    return keys


@functools.cache
def _methods() -> dict[str, tuple[str, dict[str, Any], str | None]]:
    """Return method → (its file's stem, the variant's own settings, the only kind it is for or None)."""
    found = {}
    for path in sorted(METHODS_PATH.glob("*.yaml")):
        layer = read_yaml(path)
        for name, settings in {path.stem: {}, **section_of(layer, "variants")}.items():
            found[name] = (path.stem, settings, layer.get("only"))
    return found


def available_methods(kind: str = "nlg") -> tuple[str, ...]:
    """Return the names of the method files and of the variants in them, but for those marked `only:` the other kind."""
    return tuple(sorted(name for name, (_, _, only) in _methods().items() if only in (None, kind)))


def _kind_of(base: dict[str, Any], kind: str | None, config_path: Path) -> str:
    """Return nlu for a file with the section `nlu` or `tasks`, else what is asked for, or nlg."""
    if "nlu" in base or "tasks" in base:
        if kind == "nlg":
            raise UserError(f"{config_path} is an NLU config: use sh scripts/nlu.sh or train_nlu.py")
        return "nlu"
    data = base.get("data")
    if kind == "nlu" and ("method" in base or (isinstance(data, dict) and "name" in data)):
        raise UserError(f"{config_path} is an NLG config: use sh scripts/ba-lora.sh or train_nlg.py")
    return kind or "nlg"


def _method_layer(method: str, kind: str) -> dict[str, Any]:
    check_choice("method", method, available_methods(kind))
    stem, variant, _ = _methods()[method]
    layer = read_yaml(METHODS_PATH / f"{stem}.yaml")
    block = section_of(layer, kind)
    for key in ("only", "variants", "nlg", "nlu"):
        layer.pop(key, None)
    layer = _overlay(layer, block)
    if "terms" in variant:
        layer["regularizers"] = _of_terms(layer["regularizers"], variant["terms"])
    return _overlay(layer, {key: value for key, value in variant.items() if key != "terms"})


def _of_terms(regularizers: dict[str, Any], terms: list[str]) -> dict[str, Any]:
    """Return the settings of some terms only: the others' λ is 0, and what else they have is left at the default."""
    prefixes = tuple(f"{term}_" for term in terms) + (("temperature",) if "consistency" in terms else ())
    weights = {key: value for key, value in regularizers.items() if key.startswith("lambda_") and key != "lambda_mode"}
    return {
        **{key: value for key, value in regularizers.items() if key.startswith(prefixes)},
        **{key: value if key.removeprefix("lambda_") in terms else 0 for key, value in weights.items()},
    }


def override_layer(overrides: list[str] | tuple[str, ...]) -> dict[str, Any]:
    for text in overrides:
        if not re.match(r"^[A-Za-z_][\w./]*=", text):  # eval.data.harness/gsm8k=FILE
            raise UserError(f"cannot read {text!r}: overrides are key=value, such as trainer.max_steps=20")
        refuse_interpolations(text, "the command line")
    try:
        return functools.reduce(_overlay, map(_word_layer, overrides), {})
    except Exception as error:
        raise UserError(f"cannot read the overrides {' '.join(overrides)}: {_yaml_fault(error)}") from error


@functools.lru_cache(maxsize=4096)  # a table has the same words in many rows
def _word_layer(word: str) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.from_dotlist([word]))


def _refuse_unknown(layer: dict[str, Any], source: str | Path, schema: Any, node: Any, prefix: str = "") -> None:
    known = {entry.name: entry.type for entry in dataclasses.fields(node)}
    for key, value in layer.items():
        if key not in known:
            _refuse_key(prefix, str(key), source, schema)
        if dataclasses.is_dataclass(known[key]):
            if not isinstance(value, dict):
                raise UserError(f"{prefix}{key} is a section: give {prefix}{key}.<name>=value")
            _refuse_unknown(value, source, schema, known[key], f"{prefix}{key}.")
        kind = typing.get_origin(known[key])
        if kind in (dict, list) and value is not None and not isinstance(value, kind):
            form = "{NAME: VALUE}" if kind is dict else "[ONE, OTHER]"
            raise UserError(f"{prefix}{key}={value} (read with {source}): give {prefix}{key}={form}")


def _refuse_key(prefix: str, key: str, source: str | Path, schema: type[RunConfig]) -> NoReturn:
    name = prefix + key
    if reason := schema.refused.get(name):
        raise UserError(f"{name} has no effect on a run of {schema.kind.upper()}: {reason} (read with {source})")
    others = [kind for kind, other in SCHEMAS.items() if name in valid_keys(other)]
    if others:
        raise UserError(
            f"{name} is a key of {others[0].upper()} runs, not of {schema.kind.upper()} (read with {source})"
        )
    raise UserError(f"unknown key {name}{_nearest_key(prefix, key, schema)} (read with {source})")


def _nearest_key(prefix: str, key: str, schema: Any) -> str:
    """Return ` (nearest: …)`: keys of just this name in a section come first, then those spelt alike."""
    keys = valid_keys(schema)
    if not prefix and (key in ALIASES or key in argument_types()):
        return nearest_argument(key)
    same = [name for name in keys if name.rpartition(".")[2] == key]
    return f" (nearest: {', '.join(same)})" if same else nearest(prefix + key, keys)


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return one layer on another: mappings are merged, anything else is replaced. OmegaConf's merge does the same in
    many times the time, which a table of hundreds of runs would wait for."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _overlay(below[key], value) if both else value
    return merged


def _typed(node: Any, layer: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the layer with each value as OmegaConf makes it of its field's type. Raises its errors, by full key."""
    kinds, typed = {entry.name: entry.type for entry in dataclasses.fields(node)}, {}
    for key, value in layer.items():
        if dataclasses.is_dataclass(kinds[key]):
            typed[key] = _typed(kinds[key], value, f"{prefix}{key}.")
        elif type(value) is kinds[key] and value != "???":  # OmegaConf's word for what is missing
            typed[key] = value
        else:
            if (hint := misfit(kinds[key], value)) is not None:
                raise UserError(f"{prefix}{key}={value}: {wanted_at(node, key)} is needed{hint}")
            try:
                typed[key] = copy.deepcopy(_typed_value(node, key, pickle.dumps(value)))
            except OmegaConfBaseException as error:
                error.full_key = f"{prefix}{error.full_key}"
                raise
    return typed


@functools.lru_cache(maxsize=4096)  # a table has the same values hundreds of times
def _typed_value(node: Any, key: str, value: bytes) -> Any:
    """Return a pickled value as the field `key` of a dataclass has it."""
    return OmegaConf.to_container(OmegaConf.merge(_structured(node), {key: pickle.loads(value)}))[key]


def _of_values(node: Any, values: dict[str, Any]) -> Any:
    """Return the dataclass of plain values, its sections likewise."""
    kinds = {entry.name: entry.type for entry in dataclasses.fields(node)}
    sections = {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}
    return node(**values | {name: _of_values(kind, values.get(name, {})) for name, kind in sections.items()})


@functools.cache
def _structured(schema: Any) -> DictConfig:
    return OmegaConf.structured(schema)
