"""What a hyper-parameter search is: configs/search/<name>.yaml → `SearchSpace`, checked.

    title: …                        heading of the report
    source: arXiv …                 where the space is from; absent: our own
    engine: tpe                     tpe | random | grid (Optuna) | nomad (PyNomadBBO)
    search_seed: 0                  of the engine
    trials: 30                      the budget; grid: null is every point
    seeds: [42]                     the trainings of a trial; its value is their mean
    trials_at_once: 1               how many trials are proposed before the first of them is known
    objective: heldout_loss         heldout_loss | heldout_accuracy, on rows that are neither trained on nor a test set
    overrides: [data.heldout_share=0.1, …]     of every trial, not of the best config: how a trial is measured
    pruning: {percentile: 50, startup_trials: 5, warmup_steps: 0}    absent: every trial is trained to its end
    warm: true                      trials are forked from one process that has imported everything (CPU only)
    parameters:                     any key of a config, and `method`
      trainer.learning_rate: {float: [1.0e-4, 1.0e-2], log: true, start: 2.0e-3, points: 5}
      adapter.rank: {choice: [4, 8, 16]}
      adapter.alpha: {int: [1, 64], times: adapter.rank}      the number times another parameter

`start`: the values of the first trial, for all parameters or for none (NOMAD then starts in the middle); `points`: how
many values a grid takes of a float or int. `engine`, `search_seed`, `trials`, `seeds`, `trials_at_once` may be typed.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any

from ba_lora.config.layers import find_config, load_config, read_yaml
from ba_lora.config.schema import RunConfig, training_hash
from ba_lora.config.structured import read_mapping
from ba_lora.errors import UserError
from ba_lora.paths import PROJECT_ROOT, resolve_path
from ba_lora.words import check_choice, nearest

SPACES_PATH = PROJECT_ROOT / "configs" / "search"
ENGINES = ("tpe", "random", "grid", "nomad")
OBJECTIVES = ("heldout_loss", "heldout_accuracy")
TYPED = ("engine", "search_seed", "trials", "seeds", "trials_at_once")  # what the command line may change
MAX_TRIALS = 100_000

_HELDOUT_ROWS = "it changes the held-out rows, so that trials could not be compared"
_RESERVED = {
    "seed": "the trainings' seeds are `seeds`, the engine's is `search_seed`",
    "output_dir": "a trial has a folder of its own",
    "results_dir": "a trial has a folder of its own",
    "overwrite": "a trial is trained once",
    "name": "it is the base's",
    "task": _HELDOUT_ROWS,
    "nlu.task": _HELDOUT_ROWS,
    "nlu.heldout_share": _HELDOUT_ROWS,
    "nlu.selection": "the objective says what is measured",
}


@dataclass(frozen=True)
class Parameter:
    """One searched key: a float or int between `low` and `high`, or one of `choices`.

    `times`: the parameter that the number is multiplied by to give the key's value.
    """

    key: str
    kind: str  # float | int | choice
    low: float = 0
    high: float = 0
    log: bool = False
    choices: tuple[Any, ...] = ()  # lists as their JSON text
    start: Any = None
    points: int | None = None
    times: str | None = None

    def grid(self) -> list[Any]:
        """Return the values that a grid takes. Raises UserError where a range does not say how many."""
        if self.kind == "choice":
            return list(self.choices)
        number = self.points or (int(self.high - self.low) + 1 if self.kind == "int" and not self.log else None)
        if number is None:
            raise UserError(
                f"parameters.{self.key}: engine grid needs points: N, the number of values between the ends"
            )
        values = [self.at(index / max(number - 1, 1)) for index in range(number)]
        return list(dict.fromkeys(values))

    def at(self, share: float) -> Any:
        """Return the value at a share, 0 to 1, of the way from the low end to the high one on the parameter's scale."""
        if self.kind == "choice":
            return self.choices[round(share * (len(self.choices) - 1))]
        if share in (0, 1):
            return self.low if share == 0 else self.high
        if self.log:
            value = math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + share * (self.high - self.low)
        return round(value) if self.kind == "int" else value

    def share_of(self, value: Any) -> float:
        """Return where a value lies between the ends: the inverse of `at`."""
        if self.kind == "choice":
            return self.choices.index(value) / max(len(self.choices) - 1, 1)
        ends = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        place = math.log(value) if self.log else value
        return (place - ends[0]) / (ends[1] - ends[0])


@dataclass(frozen=True)
class Pruning:
    """A trial ends where its best evaluation so far is worse than this percentile of the whole trials' at that step:
    from `warmup_steps` on, and once `startup_trials` are whole (Optuna's PercentilePruner)."""

    percentile: float = 50.0
    startup_trials: int = 5
    warmup_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class SearchFile:
    """The file; see this module's head. `parameters` and `pruning` as they stand there, each read by itself."""

    title: str
    objective: str
    parameters: dict[str, Any]
    source: str | None = None
    engine: str = "tpe"
    search_seed: int = 0
    trials: int | None = None
    seeds: tuple[int, ...] = (42,)
    trials_at_once: int = 1
    overrides: tuple[str, ...] = ()
    pruning: dict[str, Any] | None = None
    warm: bool = False


# What stands at a parameter's key. Three of the names are Python's own, so that no class body can have them.
ParameterEntry = make_dataclass(
    "ParameterEntry",
    [
        ("float", tuple[float, ...], ()),
        ("int", tuple[int, ...], ()),
        ("choice", tuple[Any, ...], ()),
        ("log", bool, False),
        ("start", Any, None),
        ("points", int | None, None),
        ("times", str | None, None),
    ],
    frozen=True,
)


_Start = {kind: make_dataclass("Start", [("start", of)]) for kind, of in (("float", float), ("int", int))}


@dataclass(frozen=True, kw_only=True)
class SearchSpace(SearchFile):
    """A search as its file and the command line ask for it: the file, checked."""

    name: str
    parameters: tuple[Parameter, ...]
    pruning: Pruning | None = None

    @property
    def maximise(self) -> bool:
        return self.objective == "heldout_accuracy"

    @property
    def start(self) -> dict[str, Any] | None:
        """The values of the first trial; None where the file has none."""
        values = {parameter.key: parameter.start for parameter in self.parameters}
        return None if None in values.values() else values

    @property
    def budget(self) -> int:
        """The number of trials; a grid's is at most the number of its points."""
        if self.engine != "grid":
            assert self.trials is not None, "checked when it was read"
            return self.trials
        points = math.prod(len(parameter.grid()) for parameter in self.parameters)
        return points if self.trials is None else min(self.trials, points)

    def words(self, values: Mapping[str, Any]) -> list[str]:
        """Return `key=value` for a trial's values."""
        return [
            f"{p.key}={_text(values[p.key] * values[p.times] if p.times else values[p.key])}" for p in self.parameters
        ]

    def identity(self) -> dict[str, Any]:
        """Return all that decides which trials the search makes, as JSON has it."""
        plain = {
            key: value for key, value in dataclasses.asdict(self).items() if key not in ("title", "source", "warm")
        }
        return json.loads(json.dumps(plain))


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return repr(value) if isinstance(value, float) else str(value)


def available_spaces() -> list[str]:
    """Return the names of the files of configs/search."""
    return sorted(path.stem for path in SPACES_PATH.glob("*.yaml"))


def load_space(name: str, *, typed: Mapping[str, Any] | None = None) -> SearchSpace:
    """Read a space by its name or path; `typed` stands over what the file says. Raises UserError, in one line, for
    anything wrong in it."""
    path = resolve_path(name) if name.endswith((".yaml", ".yml")) else SPACES_PATH / f"{name}.yaml"
    if not path.is_file():
        known = available_spaces()
        raise UserError(f"no such search space: {name}{nearest(name, known)}; there are {', '.join(known)}")
    file = read_mapping(SearchFile, read_yaml(path) | (typed or {}), where=path)
    try:
        return _checked(file, path.stem)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _checked(file: SearchFile, name: str) -> SearchSpace:
    if not file.parameters:
        raise UserError("parameters is empty; the head of ba_lora/experiments/search/space.py describes the file")
    if file.objective not in OBJECTIVES:
        raise UserError(
            f"objective: {file.objective} is refused: choose one of {', '.join(OBJECTIVES)}; a search that looks "
            "at a test set chooses its noise, and leaves nothing to report"
        )
    check_choice("engine", file.engine, ENGINES)
    if file.trials is None and file.engine != "grid":
        raise UserError(f"trials is missing: engine {file.engine} needs a budget")
    _within("trials", file.trials, 1, MAX_TRIALS)
    _within("trials_at_once", file.trials_at_once, 1, MAX_TRIALS)
    _within("search_seed", file.search_seed, 0, 2**31 - 1)
    if not file.seeds or len({*file.seeds}) < len(file.seeds):
        raise UserError(f"seeds: {[*file.seeds]}: a list of different whole numbers is needed")
    for seed in file.seeds:
        _within("seeds", seed, 0, 2**32 - 1)
    parameters = tuple(_parameter(key, entry) for key, entry in file.parameters.items())
    _check_together(parameters)
    found = vars(file) | {"parameters": parameters, "pruning": _pruning(file.pruning)}
    space = SearchSpace(name=name, **found)
    assert space.budget  # of a grid: every range says how many points
    return space


def _within(key: str, value: int | None, least: int, most: int) -> None:
    if value is not None and not least <= value <= most:
        raise UserError(f"{key}: {value}: a whole number from {least} to {most} is needed")


def _pruning(raw: Mapping[str, Any] | None) -> Pruning | None:
    if not raw:
        return None
    pruning = read_mapping(Pruning, raw, where="pruning")
    _within("pruning.startup_trials", pruning.startup_trials, 1, MAX_TRIALS)
    _within("pruning.warmup_steps", pruning.warmup_steps, 0, 2**31 - 1)
    if not 0 < pruning.percentile < 100:
        raise UserError(f"pruning.percentile: {pruning.percentile}: a number between 0 and 100 is needed")
    return pruning


def _parameter(key: str, raw: Any) -> Parameter:
    where = f"parameters.{key}"
    if reason := _RESERVED.get(key):
        raise UserError(f"{where} is refused: {reason}")
    for prefix, reason in (
        ("data.", _HELDOUT_ROWS),
        ("eval.", "the objective says what is measured"),
        ("hub.", "trials are not pushed"),
    ):
        if key.startswith(prefix) and key != "data.packing":
            raise UserError(f"{where} is refused: {reason}")
    entry = read_mapping(ParameterEntry, raw, where=where)
    kinds = [kind for kind in ("float", "int", "choice") if raw.get(kind) is not None]
    if len(kinds) != 1:
        raise UserError(f"{where}: one of float, int and choice is needed")
    (kind,) = kinds
    values, start = getattr(entry, kind), entry.start
    _within(f"{where}.points", entry.points, 2, MAX_TRIALS)
    if kind == "choice":
        if unused := [name for name in ("log", "points", "times") if name in raw]:
            raise UserError(f"{where}.{unused[0]} has no effect on a choice: leave it out")
        choices, start = tuple(map(_plain, values)), _plain(start)
        if len(choices) < 2:
            raise UserError(f"{where}.choice: {[*values]}: a list of at least two values is needed")
        if len({*map(str, choices)}) < len(choices):
            raise UserError(f"{where}.choice: a value stands there twice")
        if start is not None and start not in choices:
            raise UserError(f"{where}.start: {start} is not one of the choices")
        return Parameter(key, kind, choices=choices, start=start)
    if len(values) != 2:
        raise UserError(f"{where}.{kind}: {[*values]}: [low, high] is needed")
    if start is not None:  # of the range's own type
        start = read_mapping(_Start[kind], {"start": start}, where=where).start
    low, high = values
    if not low < high:
        raise UserError(f"{where}.{kind}: [{low}, {high}]: the low end comes first, and below the high one")
    if entry.log and low <= 0:
        raise UserError(f"{where}: log needs a low end above 0, found {low}")
    if start is not None and not low <= start <= high:
        raise UserError(f"{where}.start: {start} is outside [{low}, {high}]")
    return Parameter(key, kind, low, high, entry.log, start=start, points=entry.points, times=entry.times)


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) or value is None else json.dumps(value)


def _check_together(parameters: Sequence[Parameter]) -> None:
    by_key = {parameter.key: parameter for parameter in parameters}
    for one, other in itertools.permutations(by_key, 2):
        if other.startswith(f"{one}."):
            raise UserError(f"parameters: {other} is part of {one}: search one of them")
    for parameter in parameters:
        if parameter.times is None:
            continue
        factor = by_key.get(parameter.times)
        if factor is None or factor is parameter or factor.times is not None:
            raise UserError(f"parameters.{parameter.key}.times: {parameter.times} is no other parameter by itself")
        if not all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in (factor.at(0), factor.at(1))
        ):
            raise UserError(f"parameters.{parameter.key}.times: {parameter.times} has values that are no numbers")
    started = [parameter.key for parameter in parameters if parameter.start is not None]
    if started and len(started) < len(parameters):
        missing = next(parameter.key for parameter in parameters if parameter.start is None)
        raise UserError(
            f"parameters.{missing}: start is missing: the first trial takes it of all parameters or of none"
        )


OF_TRIALS = {  # what is not to be typed → what is
    "seed": "give seeds=[1,2], or leave it out",
    "output_dir": "give output=DIR, the search's folder, or leave it out",
    "overwrite": "give output=DIR, another folder, or leave it out",
}


def check_runs(
    space: SearchSpace, config_path: str, *, method: str | None, words: Sequence[str], kind: str
) -> RunConfig:
    """Return the config of the first trial, every parameter having been tried at both ends (each choice).

    Raises UserError for a key that is unknown, that the typed words set, too, or that changes no trained weight, and
    for a value that no run may have.
    """
    searched = {parameter.key for parameter in space.parameters}
    if method is not None and "method" in searched:
        raise UserError(f"method={method}: the search chooses method: leave it out")
    for word in words:
        if instead := OF_TRIALS.get(word.partition("=")[0]):
            raise UserError(f"{word}: a search sets it for each trial: {instead}")
    for word in (*words, *space.overrides):
        if word.partition("=")[0] in searched:
            raise UserError(f"{word}: the search chooses {word.partition('=')[0]}: leave it out")
    first = {p.key: p.start if p.start is not None else p.at(0.5) for p in space.parameters}
    given = None if "method" in searched else method

    def resolved(values: Mapping[str, Any]) -> RunConfig:
        asked = [*words, *space.overrides, *space.words(values)]
        return load_config(config_path, method=given, overrides=asked, kind=kind)

    for parameter in space.parameters:
        hashes = set()
        for value in parameter.choices or (parameter.low, parameter.high):
            try:
                hashes.add(training_hash(resolved(first | {parameter.key: value})))
            except UserError as error:
                raise UserError(f"parameters.{parameter.key} at {value}: {error}") from error
        if len(hashes) == 1:
            raise UserError(f"parameters.{parameter.key} has no effect on what is trained: take it out")
    return resolved(first)


def base_kind(config_path: str) -> str:
    """Return nlg or nlu, by what the base's file has."""
    base = read_yaml(find_config(config_path, kind=None))
    return "nlu" if "nlu" in base or "tasks" in base else "nlg"
