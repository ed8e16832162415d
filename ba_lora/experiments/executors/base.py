"""What a grid asks of an executor, and what it gives to one: `Executor`, `Slot`, `StageQueue`.

A grid takes a run's lock, asks `find` whether somebody has given the run away before, else `free_slot` for room and
`submit` for a `StageQueue` to be worked on; it collects what has ended from `wait`, writes down what came of it, and
says so by `forget`. `cancel` is the last call, whether all is done or the grid was interrupted.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, ClassVar, Self

from ba_lora.experiments.stages import Stage


@dataclass(frozen=True)
class Slot:
    """A place for one work: what its commands get into their environment, how many GPUs they see, and, on this
    machine, the lock of each of these GPUs."""

    name: str
    environment: dict[str, str]
    lock_paths: tuple[Path, ...] = ()
    num_gpus: int = 0

    @property
    def launch_environment(self) -> dict[str, str]:
        """What decides the launcher of a training here: the slot's environment and a chosen ACCELERATE_CONFIG."""
        chosen = os.environ.get("ACCELERATE_CONFIG")
        return self.environment | ({"ACCELERATE_CONFIG": chosen} if chosen else {})


@dataclass(frozen=True)
class StageFailure:
    """A stage that ended with another status than 0. error: what happened, where its log cannot tell."""

    stage: Stage
    status: int
    log_path: Path
    error: str | None = None


@dataclass
class StageQueue:
    """Stages to run one after another, their output into `log_folder`; `locks` are held until `release`.

    A stage is left out once all runs that it serves have failed in an earlier one that it needs: in any but another
    task's scoring. doing: training | evaluating; states: run folder → the evaluation's state as it was before.

    The executor fills in the rest. `waiting`: what is not done yet; `failures`: run folder → where, in their order;
    `log_path`: of the stage that runs; `started`: by the monotonic clock; `seconds`: of all stages. Of an executor that
    gives the work on: `place`: where it is, in words; `queued`: it has not begun; `news`: lines that nobody has told
    yet.
    """

    stages: list[Stage]
    log_folder: Path
    locks: list[IO[str]] = field(default_factory=list)
    doing: str = "training"
    states: Mapping[Path, dict[str, Any]] = field(default_factory=dict)
    waiting: list[Stage] = field(default_factory=list)
    failures: dict[Path, list[StageFailure]] = field(default_factory=dict)
    log_path: Path | None = None
    started: float = 0.0
    seconds: float = 0.0
    place: str = ""
    queued: bool = False
    news: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting = list(self.stages)

    @property
    def run_paths(self) -> list[Path]:
        """The folders of the runs that the stages serve, each once."""
        return list(dict.fromkeys(path for stage in self.stages for path in stage.run_paths))

    def goes_on(self, run_path: Path) -> bool:
        """Whether nothing has failed that the run's next stages need."""
        return all(failure.stage.task is not None for failure in self.failures.get(run_path, []))

    def fail(self, stage: Stage, status: int, log_path: Path, error: str | None = None) -> None:
        """Write down that a stage has failed for all its runs."""
        for run_path in stage.run_paths:
            self.failures.setdefault(run_path, []).append(StageFailure(stage, status, log_path, error))

    def release(self) -> None:
        """Give the locks back."""
        release(self.locks)


class Busy(Exception):
    """A run may be worked on elsewhere, and its executor cannot know now: it is asked again. The text says why."""


@dataclass(frozen=True)
class NoSettings:
    """Of an executor that has none."""


class Executor(ABC):
    """Runs the work of a grid. A file of ba_lora/experiments/executors with a class of these methods, and `EXECUTOR`
    naming it, is one; `find`, `busy_elsewhere`, `forget` and `cancel` have a default for one that keeps nothing.

    settings_kind: a dataclass of what a file of configs/executors may have beside `executor`, with types and defaults
    (ba_lora/config/structured.py reads it); on_this_machine: whether the works run where the grid does, so that what a
    table needs first (`prepare`) may run beside it; node_failures: how often a node failed under a work, which is no
    failure of the work.
    """

    settings_kind: ClassVar[type] = NoSettings
    on_this_machine: ClassVar[bool] = False
    node_failures: int = 0

    @classmethod
    @abstractmethod
    def open(cls, settings: Any, *, folder: Path, gpus: int, workers: int | None) -> Self:
        """Return an executor for runs of `gpus` GPUs (on a machine without any: 1). settings: a `settings_kind`;
        folder: for files of its own; workers: at most so many works at once. Raises UserError for settings that it
        cannot use."""

    @property
    @abstractmethod
    def places(self) -> list[str]:
        """The names of the places where works run at once."""

    @abstractmethod
    def free_slot(self) -> Slot | None:
        """Return room for one more work, None where there is none now."""

    @abstractmethod
    def submit(self, work: StageQueue, slot: Slot) -> None:
        """Take the work, for the slot that `free_slot` has just given."""

    @abstractmethod
    def wait(self, timeout_s: float) -> list[StageQueue]:
        """Return the work that has ended since, after `timeout_s` at the latest."""

    def find(self, run_path: Path) -> StageQueue | None:
        """Return what an earlier grid has given away for this run, whose lock the caller holds, and nobody has
        collected; `wait` will return it. None: nothing. Raises Busy where that cannot be known now."""
        return None

    def forget(self, work: StageQueue, run_path: Path) -> None:  # noqa: B027 - most executors keep nothing
        """Keep nothing of an ended work for this run: what came of it is written down."""

    def busy_elsewhere(self) -> list[str]:
        """Return who held the places that this grid could not have when it last asked for a slot."""
        return []

    def cancel(self, *, jobs: bool = False) -> list[str]:
        """End the works that have not ended, those that a cluster has only with `jobs`; return what to tell of it."""
        return []


def release(locks: list[IO[str]]) -> None:
    """Close the locks' files, and forget them."""
    for lock in locks:
        lock.close()
    locks.clear()


def log_lines(path: Path) -> list[str]:
    """Return a log's lines that are not empty, stripped; each state of a progress bar is a line. No log: no lines."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = re.split(r"(?:[\r\n]|\x1b\[A)+", text)  # a bar goes back by \r, a nested one up by ESC [A
    return [line.strip() for line in lines if line.strip()]
