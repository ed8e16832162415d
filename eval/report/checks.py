"""Checks of a table's `report:` block: each returns the value, or raises UserError naming where it stands."""

from collections.abc import Mapping, Sequence
from typing import Any

from ba_lora.config.schema import nearest
from ba_lora.errors import UserError


def mapping(value: Any, known: Sequence[str] | None = None, *, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping, found {type(value).__name__}")
    for key in value if known is not None else ():
        if key not in known:
            raise UserError(f"{where}: unknown key {key}{nearest(str(key), list(known))}")
    return {str(key): entry for key, entry in value.items()}


def words(value: Any, *, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(word, str) for word in value):
        raise UserError(f"{where} must be a list of words, found {value!r}")
    return tuple(value)


def choice(value: Any, choices: Sequence[str], *, where: str) -> Any:
    if value not in choices:
        raise UserError(
            f"{where}: {value} is unknown: choose one of {', '.join(choices)}{nearest(value, list(choices))}"
        )
    return value
