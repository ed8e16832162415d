"""What is typed or written by hand: `key=value` words, and the nearest of the keys and names that are known."""

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ba_lora.errors import UserError

# What a true or false tells where a word is needed.
YAML_WORDS = "YAML reads yes, no, on and off as true and false: write such a word in quotes"


def nearest(word: object, choices: Iterable[str]) -> str:
    """Return ` (nearest: a, b)`, or nothing where nothing is near."""
    found = difflib.get_close_matches(str(word), list(choices), n=3, cutoff=0.4)
    return f" (nearest: {', '.join(found)})" if found else ""


def take_options(
    words: Sequence[str], keys: Collection[str], *, example: str | None = None
) -> tuple[dict[str, str], list[str]]:
    """Return key → text of the `key=value` words for `keys` (the last one counts), and the other words in order.

    example: such as `trainer.max_steps=20`; a word that is no `key=value` then raises UserError with this example.
    """
    taken, others = {}, []
    for word in words:
        key, equals, text = word.partition("=")
        if example is not None and not equals:
            raise UserError(f"cannot read {word!r}: give key=value, such as {example}")
        if equals and key in keys:
            taken[key] = text
        else:
            others.append(word)
    return taken, others


def read_list(key: str, text: str) -> list[str]:
    """Return the words of `A[,B…]` or `[A,B…]`. Raises UserError where one is empty."""
    words = [word.strip() for word in text.strip("[]").split(",")]
    if not all(words):
        raise UserError(f"{key}={text}: a name or several, as in {key}=A,B, are needed")
    return words


def read_numbers(key: str, text: str) -> tuple[int, ...]:
    """Return the whole numbers of `0[,20…]` or `[0,20…]`. Raises UserError for anything else."""
    words = [word.strip() for word in text.strip("[]").split(",")]
    if not all(word.isdecimal() for word in words):
        raise UserError(f"{key}={text}: whole numbers are needed, such as {key}=0,20")
    return tuple(map(int, words))


def check_choice(key: str, value: object, choices: Collection[str]) -> None:
    """Raise UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{key}={value} is unknown{nearest(value, choices)}: choose one of {', '.join(choices)}")


def holds_bool(value: Any) -> bool:
    """Return whether a value of a YAML file is true or false, or holds one, as a key or a value at any depth."""
    if isinstance(value, Mapping):
        return any(map(holds_bool, value)) or any(map(holds_bool, value.values()))
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(holds_bool, value)))


def check_keys(value: Any, known: Collection[str] | None, *, where: object) -> None:
    """Raise UserError unless `value` is a mapping whose keys are all known; None: any keys."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where} must be a mapping, found {type(value).__name__}")
    for key in value if known is not None else ():
        if key not in known:
            raise UserError(f"{where}: unknown key {key}{nearest(key, known)}")
