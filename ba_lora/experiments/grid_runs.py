"""The work of a grid: which run is next, for which stages, with which others, and what came of it.

A run is worked on under its lock. What is to be done for it is read from its files (state.py), after the lock is taken.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from ba_lora.config.schema import UNTUNED, RunConfig
from ba_lora.errors import UserError
from ba_lora.experiments.evaluation_state import evaluation_state
from ba_lora.experiments.executors.base import Busy, Executor, Slot, StageQueue
from ba_lora.experiments.grid_progress import GridProgress, Running
from ba_lora.experiments.pipeline import begin_evaluation, prepare_evaluation, record_evaluation, record_result
from ba_lora.experiments.spec import Spec
from ba_lora.experiments.stages import Stage, evaluation_stages, launch_command, training_stage
from ba_lora.experiments.state import (
    DONE,
    FAILED,
    GRID_PATH,
    STALE,
    RunState,
    failure_path,
    inspect,
    record_failure,
    remember_run,
)
from ba_lora.experiments.tables import Table
from ba_lora.io import disk_errors
from ba_lora.locks import holder, try_lock, work_lock_path
from ba_lora.runs.folder import is_trained

MAX_TOGETHER = 16  # runs served by one start of the engine
POLL_S = 1.0  # while another grid works on what is left
QUIET_S = 300.0  # after this long without a line, what runs is told


class Grid(GridProgress):
    """Takes the runs of a table through their stages, and tells how far it is."""

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
        specs = {spec.config.run_path: spec for spec in table.specs()}
        super().__init__(specs, executor, refused=refused or {}, say=say)
        self.table = table
        self.graders = graders
        self.retry = retry
        self.cancel = cancel
        self._alone: set[Path] = set()  # runs that failed in company
        self._tried: set[Path] = set()
        self._named: set[Path] = set()

    def run(self) -> None:
        """Work until nothing is left that this grid could do."""
        try:
            while True:
                while (slot := self.executor.free_slot()) is not None and self._start(slot):
                    pass
                if not self.running and not self.elsewhere and self._complete():
                    return
                if not self.running:
                    self.tell_waiting()
                ended = self.executor.wait(POLL_S)
                self.tell_news()
                for work in ended:
                    self._ended(work)
                if time.monotonic() - self.said_at >= QUIET_S:
                    self.tell_running()
        finally:
            for line in self.executor.cancel(jobs=self.cancel):
                self.say(line)
            for running in self.running:
                running.work.release()

    def _complete(self) -> bool:
        return len(self.done) + len(self.failed) == len(self.specs)

    # ---- what to do next

    def _start(self, slot: Slot) -> bool:
        """Start the next piece of work on the slot; return whether there was one."""
        self.elsewhere = {}
        waiting: list[Path] = []
        busy = {spec.config.run_path for running in self.running for spec in running.specs}
        for path, spec in self.specs.items():
            if path in self.done or path in self.failed or path in busy:
                continue
            lock = self._lock(path)
            if lock is None:
                continue
            try:
                work = self.executor.find(path)
            except Busy as error:
                self.elsewhere[path] = str(error)
                lock.close()
                continue
            if work is not None:
                work.locks.append(lock)
                self.running.append(Running(work, [spec], is_found=True))
                self.tell(f"{work.doing}: {path.name}, found again: {work.place}")
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
            for config in configs:
                begin_evaluation(config, states[config.run_path], regrade=bool(regrade))
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
            self.elsewhere[path] = holder(work_lock_path(path))
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
        running = Running(work, specs)
        self.running.append(running)  # first: whatever fails now, its locks are released
        with disk_errors(work.log_folder):
            work.log_folder.mkdir(parents=True, exist_ok=True)
        self.executor.submit(work, slot)
        log = f" (log: {work.log_path})" if work.log_path else ""
        self.tell(f"{doing}: {running.names()} on {slot.name}{log}")

    # ---- what has ended

    def _ended(self, work: StageQueue) -> None:
        """Write down what came of it; only then may others have the runs."""
        running = next(running for running in self.running if running.work is work)
        try:
            self._record(running)
            for spec in running.specs:
                self.executor.forget(work, spec.config.run_path)
        finally:
            self.running.remove(running)
            work.release()

    def _record(self, running: Running) -> None:
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
            if failures and running.is_found and self.retry and path not in self._tried:  # of before this command
                self.tell(f"had failed: {path.name}: {record_failure(spec.config, failures)}; it is tried again")
            elif failures:
                self._tried.add(path)
                self._fail(spec, record_failure(spec.config, failures), f" (log: {failures[0].log_path})")
            elif work.doing == "training" and not is_trained(path, spec.config):  # else it would be trained for ever
                self._fail(spec, f"its training ended without an error, and left no whole run in {path}")
            elif work.doing == "training":
                self.train_seconds.append(work.seconds)
                self.tell(f"trained: {path.name} in {work.seconds:.0f} s")
            elif running.is_found and inspect(spec, self.graders).status != DONE:
                self.tell(f"found again: {path.name}, evaluated for something else: its own evaluation follows")
            else:
                self._finish(spec)
                self.tell(f"done: {path.name}, evaluated in {work.seconds / max(1, len(work.run_paths)):.0f} s")

    def _fail(self, spec: Spec, error: str, more: str = "") -> None:
        """Give a run up, and say so; the others go on."""
        self.failed[spec.config.run_path] = error
        self.tell(f"failed: {spec.config.run_path.name}: {error}{more}")

    def _finish(self, spec: Spec) -> None:
        path = spec.config.run_path
        if path in self.done:
            return
        self.done.add(path)
        failure_path(path).unlink(missing_ok=True)
        for cell in self.table.cells_of_runs[path]:
            remember_run(self.table, cell)


def _evaluated_alike(first: RunConfig, second: RunConfig) -> bool:
    """Whether one call may evaluate both: one base, one way to serve it, one evaluation; for NLU one task."""
    if first.kind == "nlu":
        return (first.nlu.task, first.eval) == (second.nlu.task, second.eval)
    hot = first.eval.options.get("serve") == "hot"
    return first is second or (hot and first.model == second.model and first.eval == second.eval)
