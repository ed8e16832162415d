"""Checks of a table's `report:` block: each returns the value, or raises UserError naming where it stands."""

from collections.abc import Sequence
from typing import Any

from ba_lora.errors import UserError
from ba_lora.words import check_keys, nearest


def mapping(value: Any, known: Sequence[str] | None = None, *, where: str) -> dict[str, Any]:
    check_keys(value, known, where=where)
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
