"""What `key=value` can set on eval.score's command line."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from ba_lora.errors import UserError
from eval.judge_client import JudgeOptions
from eval.tasks.base import Task


@dataclass(frozen=True)
class Options:
    """What `key=value` can set."""

    allow_partial: bool = False
    workers: int | None = None
    timeout_s: float = 5.0
    judgements: int = 3
    judge_parallel: int = 4
    judge_timeout_s: float = 120.0
    judge_attempts: int = 8
    judge_temperature: float | None = 0.0
    judge_max_tokens: int | None = 2048
    choices: Mapping[str, str] = field(default_factory=dict)  # of the tasks themselves, see Task.choices

    def judge(self) -> JudgeOptions:
        """Return what a judge is told."""
        named = {name.removeprefix("judge_"): value for name, value in vars(self).items() if name.startswith("judge")}
        return JudgeOptions(**named)


def parse_options(arguments: Sequence[str], tasks: Sequence[Task] = ()) -> Options:
    """Read `key=value` arguments, the choices of `tasks` included.

    Raises UserError for an unknown key (with the nearest) or a bad value.
    """
    values: dict[str, object] = {}
    choices: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        owners = [task for task in tasks if key in task.choices or key in task.grading_choices]
        if equals and owners:
            owners[0].configured({key: text})  # checks the value
            choices[key] = text
            continue
        if not equals or key not in _PARSERS:
            own = {key: None for task in tasks for key in (*task.choices, *task.grading_choices)}
            near = difflib.get_close_matches(key, [*_PARSERS, *own], n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"unknown argument {argument!r}: {hint}keys: {', '.join([*_PARSERS, *own])}")
        try:
            values[key] = _PARSERS[key](text)
        except ValueError as error:
            raise UserError(f"{key}={text}: {error}") from error
    return Options(**values, choices=choices)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("true or false is needed")
    return text.lower() == "true"


def _positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("a whole number of at least 1 is needed")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise ValueError("a number of seconds above 0 is needed")
    return value


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 10:
        raise ValueError("a number of at least 0, or none, is needed")
    return value


def _or_none(parser: Callable[[str], object]) -> Callable[[str], object]:
    return lambda text: None if text.lower() == "none" else parser(text)


_PARSERS: dict[str, Callable[[str], object]] = {
    "allow_partial": _boolean,
    "workers": _positive_int,
    "timeout_s": _positive_float,
    "judgements": _positive_int,
    "judge_parallel": _positive_int,
    "judge_timeout_s": _positive_float,
    "judge_attempts": _positive_int,
    "judge_temperature": _or_none(_temperature),
    "judge_max_tokens": _or_none(_positive_int),
}
