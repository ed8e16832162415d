"""Arguments of the commands in eval/: `key=value`, read into dataclasses by the types of their fields, and --data."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from ba_lora.errors import UserError
from ba_lora.paths import resolve_data
from ba_lora.words import nearest
from eval.tasks import TASKS

T = TypeVar("T")


def parse_options(arguments: Sequence[str], kind: type[T], *, further: Iterable[str] = ()) -> tuple[T, dict[str, str]]:
    """Return the dataclass `kind` with what `arguments` set, and the texts of those whose key is one of `further`.

    Read are fields of bool, int, float and str, and of these or None. Raises UserError for an unknown key (with the
    nearest) or a bad value.
    """
    known = {
        entry.name: typing.get_args(entry.type) or (entry.type,)
        for entry in dataclasses.fields(kind)
        if isinstance(entry.type, types.UnionType) or entry.type in (bool, int, float, str)
    }
    keys = [*known, *further]
    values: dict[str, object] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or key not in keys:
            raise UserError(f"unknown option {argument!r}{nearest(key, keys)}; keys: {', '.join(keys)}")
        values[key] = _parse_value(key, text, known[key]) if key in known else text
    return kind(**{key: values[key] for key in values if key in known}), {
        key: str(values[key]) for key in values if key not in known
    }


def _parse_value(key: str, text: str, kinds: Sequence[type]) -> object:
    if type(None) in kinds and text.lower() in ("", "none", "null"):
        return None
    if bool in kinds:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{key}={text}: true or false is needed")
        return text.lower() == "true"
    try:
        value = kinds[0](text)
    except ValueError as error:
        raise UserError(f"{key}={text}: {'a whole number' if int in kinds else 'a number'} is needed") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={text}: a finite number is needed")
    return value


def read_data(entries: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """Return task → data from `FILE` (a single task) or `TASK=FILE` entries."""
    data = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if equals and name in TASKS:
            data[name] = resolve_data(path)
        elif len(tasks) == 1 and not data:
            data[tasks[0]] = resolve_data(entry)
        else:
            raise UserError(f"--data {entry}: with several tasks or files write TASK=FILE")
    return data


def split_options(*lists: Sequence[str]) -> tuple[list[list[str]], list[str]]:
    """Take `key=value` out of lists that argparse filled greedily: `--task gsm8k limit=5` means limit."""

    def is_option(text: str) -> bool:
        return (
            re.match(r"[a-z_]+=", text) is not None and text.partition("=")[0] not in TASKS and not Path(text).exists()
        )

    kept = [[text for text in entries if not is_option(text)] for entries in lists]
    return kept, [text for entries in lists for text in entries if is_option(text)]
