"""Fill a table: from its config to missing runs to train → export → generate → score, then its report.

    sh scripts/reproduce.sh TABLE [--dry-run] [key=value …]          python -m ba_lora.experiments.grid TABLE …

Each stage is a command of ba_lora/experiments/stages.py in a process of its own. What is done and still holds is
skipped; what is stale (its config, its data or its grader changed) is named and redone; what failed is shown with its
error and redone with retry=true. Runs that share base and evaluation are generated for together, with one start of the
engine.

The same command may be given twice, at once or after Ctrl-C or kill -9: a run is worked on under its lock, and its
state is read from its files after the lock is taken (locks.py, state.py).

key=value changes every run (`data.num_rows=1000`), but for
    executor=NAME      where the stages run: a file of configs/executors (local), executor.KEY=VALUE over its settings
    retry=true         redo what failed                 workers=N     at most N runs at a time
    seeds=[1,2]        instead of the table's seeds     gpus=N        rows set for N GPUs a run (default: the fewest)
    only=WORD[,WORD]   the rows of these bases, methods, settings: only=llama-2-7b,lora,pissa
    output=DIR, allow=NAME, page=no    for the report; see eval/report/__main__.py
    cancel=true        Ctrl-C also ends the jobs that a cluster has (default: they go on, and are found again)
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ba_lora.config.checks import check_places
from ba_lora.config.schema import UNTUNED, RunConfig
from ba_lora.errors import CommandParser, UserError, run_entry_point
from ba_lora.experiments.evaluation_state import evaluation_state
from ba_lora.experiments.executors import find_executor, open_executor
from ba_lora.experiments.executors.base import Busy, Executor, Slot, StageQueue, log_lines
from ba_lora.experiments.options import read_grid_options, rows_for_gpus, select_rows
from ba_lora.experiments.pipeline import missing_judge, prepare_evaluation, record_evaluation, record_result
from ba_lora.experiments.plan import ask_grader_versions, check_columns, dry_run, plan_runs
from ba_lora.experiments.preparation import GRID_MODULE, prepare, prepare_words
from ba_lora.experiments.spec import Spec
from ba_lora.experiments.stages import Stage, evaluation_stages, launch_command, training_stage
from ba_lora.experiments.state import (
    DONE,
    FAILED,
    GRID_PATH,
    STALE,
    RunState,
    declare,
    failure_path,
    inspect,
    record_failure,
    remember_run,
)
from ba_lora.experiments.tables import Table, available_tables, find_table, load_table, report_folder
from ba_lora.io import disk_errors
from ba_lora.locks import holder, try_lock, work_lock_path
from ba_lora.paths import PROJECT_ROOT, stage_environment
from ba_lora.runs.folder import is_trained

__all__ = ["Grid", "Table", "load_table", "main"]

MAX_TOGETHER = 16  # runs served by one start of the engine
POLL_S = 1.0  # while another grid works on what is left
QUIET_S = 300.0  # after this long without a line, what runs is told


@dataclass
class _Running:
    """Work that has been given to the executor, and for which of this grid's runs."""

    work: StageQueue
    specs: list[Spec]

    def names(self, shown: int | None = None) -> str:
        """Return the runs' names, all or the first `shown`."""
        names = [spec.config.run_path.name for spec in self.specs]
        rest = f" and {len(names) - shown} more" if shown is not None and len(names) > shown else ""
        return ", ".join(names[:shown]) + rest


class Grid:
    """Takes the runs of a table through their stages. refused: run folder → why it is not even to be trained."""

    def __init__(
        self,
        table: Table,
        executor: Executor,
        *,
        graders: Mapping[str, Mapping[str, str | None]],
        refused: Mapping[Path, str] | None = None,
        retry: bool = False,
        cancel: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.table = table
        self.executor = executor
        self.graders = graders
        self.retry = retry
        self.cancel = cancel
        self._say = say
        self._said_at = time.monotonic()
        self.specs = {spec.config.run_path: spec for spec in table.specs()}
        self.done: set[Path] = set()
        self.failed: dict[Path, str] = dict(refused or {})
        self._elsewhere: dict[Path, str] = {}  # runs that another process holds, and who
        self._running: list[_Running] = []
        self._alone: set[Path] = set()  # runs that failed in company
        self._tried: set[Path] = set()
        self._named: set[Path] = set()
        self._train_seconds: list[float] = []
        self._node_failures = 0
        self._last_waiting = ""

    def run(self) -> None:
        """Work until nothing is left that this grid could do."""
        try:
            while True:
                while (slot := self.executor.free_slot()) is not None and self._start(slot):
                    pass
                if not self._running and not self._elsewhere and self._complete():
                    return
                if not self._running:
                    self._tell_waiting()
                ended = self.executor.wait(POLL_S)
                self._tell_news()
                for work in ended:
                    self._ended(work)
                if time.monotonic() - self._said_at >= QUIET_S:
                    self._tell_running()
        finally:
            for line in self.executor.cancel(jobs=self.cancel):
                self.say(line)
            for running in self._running:
                running.work.release()

    def _complete(self) -> bool:
        return len(self.done) + len(self.failed) == len(self.specs)

    # ---- what to do next

    def _start(self, slot: Slot) -> bool:
        """Start the next piece of work on the slot; return whether there was one."""
        self._elsewhere = {}
        waiting: list[Path] = []
        busy = {spec.config.run_path for running in self._running for spec in running.specs}
        for path, spec in self.specs.items():
            if path in self.done or path in self.failed or path in busy:
                continue
            lock = self._lock(path)
            if lock is None:
                continue
            try:
                work = self.executor.find(path)
            except Busy as busy:
                self._elsewhere[path] = str(busy)
                lock.close()
                continue
            if work is not None:
                work.locks.append(lock)
                self._running.append(_Running(work, [spec]))
                self._tell(f"{work.doing}: {path.name}, found again: {work.place}")
                continue
            state = self._look(spec)
            if state is None:
                lock.close()
            elif state.train:
                launch = launch_command(slot.launch_environment, num_gpus=slot.num_gpus)
                stage = training_stage(spec, launch, overwrite=state.overwrite)
                self._submit(slot, "training", [spec], {}, [stage], [lock])
                return True
            else:
                waiting.append(path)
                lock.close()
        return bool(waiting) and self._evaluate(slot, waiting)

    def _evaluate(self, slot: Slot, waiting: Sequence[Path]) -> bool:
        """Evaluate as many of the trained runs together as belong together."""
        first = self.specs[waiting[0]].config
        share = -(-len(waiting) // len(self.executor.places)) if len(waiting) > 1 else 1
        together = [path for path in waiting if _evaluated_alike(first, self.specs[path].config)]
        if waiting[0] in self._alone or first.method == UNTUNED:
            together = together[:1]
        locks: list[IO[str]] = []
        specs: list[Spec] = []
        regrade = None
        for path in together[: min(max(share, 1), MAX_TOGETHER)]:
            lock = self._lock(path)
            if lock is None:
                continue
            state = self._look(self.specs[path])
            if state is None or state.train or (regrade is not None and state.regrade != regrade):
                lock.close()
                continue
            regrade = state.regrade
            locks.append(lock)
            specs.append(self.specs[path])
        if not specs:
            return bool(together)  # all of them have been taken or finished meanwhile: look again
        configs = [spec.config for spec in specs]
        try:
            for config in configs:
                prepare_evaluation(config)
            stages = evaluation_stages(configs, generate=not regrade)
            states = {config.run_path: evaluation_state(config) for config in configs}
        except UserError as error:  # of what they have in common
            for spec, lock in zip(specs, locks, strict=True):
                self._fail(spec, str(error))
                lock.close()
            return True
        self._submit(slot, "evaluating", specs, states, stages, locks)
        return True

    def _lock(self, path: Path) -> IO[str] | None:
        lock = try_lock(work_lock_path(path))
        if lock is None:
            self._elsewhere[path] = holder(work_lock_path(path))
        return lock

    def _look(self, spec: Spec) -> RunState | None:
        """Return the state of a run whose lock is held; None where nothing is to be done for it (any more)."""
        path = spec.config.run_path
        try:
            state = inspect(spec, self.graders)
            if state.record:
                record_result(spec.config)
                state = inspect(spec, self.graders)
        except UserError as error:
            self._fail(spec, str(error))
            return None
        if state.status == DONE:
            self._finish(spec)
            return None
        if state.status == FAILED and (not self.retry or path in self._tried):
            self._fail(spec, state.reason, "; retry=true tries again")
            return None
        if state.status == STALE and path not in self._named:
            self._named.add(path)
            self.say(f"stale: {path.name}: {state.reason}")
        return state

    def _submit(
        self,
        slot: Slot,
        doing: str,
        specs: list[Spec],
        states: dict[Path, dict],
        stages: list[Stage],
        locks: list[IO[str]],
    ) -> None:
        work = StageQueue(stages, GRID_PATH / "logs", locks, doing, states)
        running = _Running(work, specs)
        self._running.append(running)  # first: whatever fails now, its locks are released
        with disk_errors(work.log_folder):
            work.log_folder.mkdir(parents=True, exist_ok=True)
        self.executor.submit(work, slot)
        log = f" (log: {work.log_path})" if work.log_path else ""
        self._tell(f"{doing}: {running.names()} on {slot.name}{log}")

    # ---- what has ended

    def _ended(self, work: StageQueue) -> None:
        """Write down what came of it; only then may others have the runs."""
        running = next(running for running in self._running if running.work is work)
        try:
            self._record(running)
            for spec in running.specs:
                self.executor.forget(work, spec.config.run_path)
        finally:
            self._running.remove(running)
            work.release()

    def _record(self, running: _Running) -> None:
        work = running.work
        for spec in running.specs:
            path = spec.config.run_path
            failures = work.failures.get(path, [])
            if any(len(failure.stage.run_paths) > 1 for failure in failures):
                self._alone.add(path)  # whose fault it was shows when each is tried by itself
                continue
            if not failures:
                failure_path(path).unlink(missing_ok=True)
            try:
                if work.doing == "evaluating" and work.goes_on(path):
                    failed = [failure.stage.task for failure in failures]
                    record_evaluation(spec.config, work.states[path], failed=failed)
            except UserError as error:
                self._fail(spec, str(error))
                continue
            if failures:
                self._tried.add(path)
                self._fail(spec, record_failure(spec.config, failures), f" (log: {failures[0].log_path})")
            elif work.doing == "training" and not is_trained(path, spec.config):  # else it would be trained for ever
                self._fail(spec, f"its training ended without an error, and left no whole run in {path}")
            elif work.doing == "training":
                self._train_seconds.append(work.seconds)
                self._tell(f"trained: {path.name} in {work.seconds:.0f} s")
            else:
                self._finish(spec)
                self._tell(f"done: {path.name}, evaluated in {work.seconds / max(1, len(work.run_paths)):.0f} s")

    def _fail(self, spec: Spec, error: str, more: str = "") -> None:
        """Give a run up, and say so; the others go on."""
        self.failed[spec.config.run_path] = error
        self._tell(f"failed: {spec.config.run_path.name}: {error}{more}")

    def _finish(self, spec: Spec) -> None:
        path = spec.config.run_path
        if path in self.done:
            return
        self.done.add(path)
        failure_path(path).unlink(missing_ok=True)
        for cell in self.table.cells_of_runs[path]:
            remember_run(self.table, cell)

    # ---- what is told

    def say(self, line: str) -> None:
        self._said_at = time.monotonic()
        self._say(line)

    def _tell(self, line: str) -> None:
        self.say(f"{line}   [{self.progress()}]")

    def progress(self) -> str:
        """Return how far the whole is, with the time left where trainings have been timed."""
        parts = [f"{len(self.done)} of {len(self.specs)} done"]
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        queued = sum(running.work.queued for running in self._running)
        parts += [f"{len(self._running) - queued} running, {queued} queued"] if queued else []
        parts += [f"{self._node_failures} node failures"] if self._node_failures else []
        left = len(self.specs) - len(self.done) - len(self.failed)
        if self._train_seconds and left:
            mean = sum(self._train_seconds) / len(self._train_seconds)
            untrained = sum(
                spec.trained and not (path / "train.json").is_file()
                for path, spec in self.specs.items()
                if path not in self.done and path not in self.failed
            )
            parts.append(f"about {mean * untrained / len(self.executor.places) / 60:.0f} min of training left")
        return ", ".join(parts)

    def _tell_running(self) -> None:
        for running in self._running:
            work = running.work
            minutes = (time.monotonic() - work.started) / 60
            place = f" ({work.place})" if work.place else ""
            last = (work.log_path and log_lines(work.log_path) or ["no output yet"])[-1]
            self.say(f"{work.doing}: {running.names(1)}{place}, for {minutes:.0f} min: {last}")

    def _tell_news(self) -> None:
        """Tell what the executor reports of its works: where they have begun, what has happened to them."""
        told = []
        for running in self._running:
            told += [f"{running.work.doing}: {running.names(1)}: {line}" for line in running.work.news]
            running.work.news.clear()
        self._node_failures = max(self._node_failures, sum(running.work.node_failures for running in self._running))
        for line in told:
            self._tell(line)

    def _tell_waiting(self) -> None:
        holders = sorted(set(self._elsewhere.values()) or set(self.executor.busy_elsewhere()))
        line = f"waiting: another process works on what is left ({'; '.join(holders)})"
        if holders and line != self._last_waiting:
            self._last_waiting = line
            self.say(line)


def _evaluated_alike(first: RunConfig, second: RunConfig) -> bool:
    """Whether one call may evaluate both: one base, one way to serve it, one evaluation; for NLU one task."""
    if first.kind == "nlu":
        return (first.nlu.task, first.eval) == (second.nlu.task, second.eval)
    hot = first.eval.options.get("serve") == "hot"
    return first is second or (hot and first.model == second.model and first.eval == second.eval)


# ---- the command line


def main() -> int:
    parser = CommandParser(
        prog=f"python -m {GRID_MODULE}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", nargs="?", help="a file in configs/tables, by its name or path")
    parser.add_argument("--dry-run", action="store_true", help="print runs, their state, time and disk; run nothing")
    parser.add_argument("words", nargs="*", metavar="key=value")
    parsed = parser.parse_intermixed_args()
    if parsed.table is None:
        raise UserError(f"which table? {', '.join(available_tables())}")
    options, overrides = read_grid_options(parsed.words)
    find_executor(options.executor, options.executor_settings)  # an error in it is told in a dry run, too
    whole = load_table(find_table(parsed.table), overrides=overrides, seeds=options.seeds)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    calls = [prepare_words(call, options) for call in whole.prepare]
    for words in calls if not parsed.dry_run else ():
        prepare(words)
    if whole.prepare and not parsed.dry_run:  # what was chosen then is known now
        whole = load_table(find_table(parsed.table), overrides=overrides, seeds=options.seeds)
    if whole.unchosen and not parsed.dry_run:
        raise UserError(f"{whole.id}: {whole.unchosen}")
    table = select_rows(whole, options.only)
    table, gpus, left_out = rows_for_gpus(table, options.gpus)
    check_columns(whole)
    for spec in table.specs():
        check_places(spec.config)
    graders = ask_grader_versions()
    if parsed.dry_run:
        first = [f"first: python -m {' '.join(words)}" for words in calls]
        first += [f"the runs below are not yet those of the table: {whole.unchosen}"] if whole.unchosen else []
        print("\n".join([*first, *dry_run(table, plan_runs(table, graders), retry=options.retry), *left_out]))
        return 0
    executor = open_executor(
        options.executor, options.executor_settings, folder=GRID_PATH, gpus=gpus, workers=options.workers
    )
    planned = plan_runs(table, graders)
    for entry in planned:
        if entry.changed:
            _say(f"stale: {entry.changed}; {entry.name} takes its place")
    if missing := missing_judge((spec.config for spec in table.specs()), os.environ):
        _say(missing)
    for line in left_out:
        _say(line)
    refused = {entry.spec.config.run_path: entry.refused for entry in planned if entry.refused}
    for error in dict.fromkeys(refused.values()):
        number = list(refused.values()).count(error)
        _say(f"failed: {number} runs cannot be evaluated and are not trained: {error}")
    grid = Grid(table, executor, graders=graders, refused=refused, retry=options.retry, cancel=options.cancel, say=_say)
    seeds = [f"seeds={','.join(map(str, options.seeds))}"] if options.seeds else []
    declare(whole, find_table(parsed.table), report_folder(table.id, [*overrides, *seeds]))
    _say(f"{table.id}: {len(table.specs())} runs on {', '.join(executor.places)}")
    grid.run()
    _say(grid.progress())
    for path, error in grid.failed.items():
        _say(f"failed: {path.name}: {error}")
    report = [sys.executable, "-m", "eval.report", parsed.table, *seeds, *options.report, *overrides]
    status = subprocess.run(report, cwd=PROJECT_ROOT, env=stage_environment()).returncode
    return 1 if grid.failed else status


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    run_entry_point(main, resumes=True)
