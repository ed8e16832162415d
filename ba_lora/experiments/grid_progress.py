"""How far a grid is: its runs that are done, failed, or worked on, and the lines that it tells of them."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ba_lora.experiments.executors.base import Executor, StageQueue, log_lines
from ba_lora.experiments.spec import Spec


@dataclass
class Running:
    """Work that has been given to the executor, and for which of this grid's runs."""

    work: StageQueue
    specs: list[Spec]
    is_found: bool = False  # somebody else's, who may have asked for other tasks or settings

    def names(self, shown: int | None = None) -> str:
        """Return the runs' names, all or the first `shown`."""
        names = [spec.config.run_path.name for spec in self.specs]
        rest = f" and {len(names) - shown} more" if shown is not None and len(names) > shown else ""
        return ", ".join(names[:shown]) + rest


class GridProgress:
    """The state of a grid's runs. refused: run folder → why it is not even to be trained; say: takes a line.

    `elsewhere`: runs that another process holds, and who; `train_seconds`: of each training that ended well.
    """

    def __init__(
        self, specs: Mapping[Path, Spec], executor: Executor, *, refused: Mapping[Path, str], say: Callable[[str], None]
    ) -> None:
        self.specs = specs
        self.executor = executor
        self.done: set[Path] = set()
        self.failed: dict[Path, str] = dict(refused)
        self.elsewhere: dict[Path, str] = {}
        self.running: list[Running] = []
        self.train_seconds: list[float] = []
        self.said_at = time.monotonic()
        self._say = say
        self._last_waiting = ""

    def say(self, line: str) -> None:
        self.said_at = time.monotonic()
        self._say(line)

    def tell(self, line: str) -> None:
        self.say(f"{line}   [{self.progress()}]")

    def progress(self) -> str:
        """Return how far the whole is, with the time left where trainings have been timed."""
        parts = [f"{len(self.done)} of {len(self.specs)} done"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        queued = sum(running.work.queued for running in self.running)
        parts += [f"{len(self.running) - queued} running, {queued} queued"] if queued else []
        failures = self.executor.node_failures
        parts += [f"{failures} node failures"] if failures else []
        left = len(self.specs) - len(self.done) - len(self.failed)
        if self.train_seconds and left:
            mean = sum(self.train_seconds) / len(self.train_seconds)
            untrained = sum(
                spec.trained and not (path / "train.json").is_file()
                for path, spec in self.specs.items()
                if path not in self.done and path not in self.failed
            )
            parts.append(f"about {mean * untrained / len(self.executor.places) / 60:.0f} min of training left")
        return ", ".join(parts)

    def tell_running(self) -> None:
        for running in self.running:
            work = running.work
            minutes = (time.monotonic() - work.started) / 60
            place = f" ({work.place})" if work.place else ""
            last = (work.log_path and log_lines(work.log_path) or ["no output yet"])[-1]
            self.say(f"{work.doing}: {running.names(1)}{place}, for {minutes:.0f} min: {last}")

    def tell_news(self) -> None:
        """Tell what the executor reports of its works: where they have begun, what has happened to them."""
        told = []
        for running in self.running:
            told += [f"{running.work.doing}: {running.names(1)}: {line}" for line in running.work.news]
            running.work.news.clear()
        for line in told:
            self.tell(line)

    def tell_waiting(self) -> None:
        holders = sorted(set(self.elsewhere.values()) or set(self.executor.busy_elsewhere()))
        line = f"waiting: another process works on what is left ({'; '.join(holders)})"
        if holders and line != self._last_waiting:
            self._last_waiting = line
            self.say(line)
