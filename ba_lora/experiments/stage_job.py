"""A work as a job of a cluster: the stages run on its node, and end in order when the cluster says so."""

import dataclasses
import os
import shutil
import signal
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ba_lora.errors import UserError
from ba_lora.experiments.executors.base import Slot, StageQueue
from ba_lora.experiments.executors.local import LocalExecutor, group_lives
from ba_lora.experiments.stages import OVERWRITE, Stage
from ba_lora.io import append_line
from ba_lora.locks import training_lock_path, try_lock
from ba_lora.runs.folder import CLAIM

SIGNAL = "USR1"  # Slurm's, before a time limit and on preemption
UNMOVED = ("sh", "-c", f'trap "" {SIGNAL}; exec "$@"', "sh")  # stands before a command that the signal is not to end
AGAIN_S = 5.0  # between two signals to a stage that has not ended yet
RESERVE_S = 20.0  # of the time before a job's end: for the way back into the queue
LOCK_WAIT_S = 900.0  # for a process of the run that still lives on a node which the cluster has given up


@dataclass
class StageJob:
    """What a job does, pickled by submitit: its work, on its node, by a LocalExecutor. `waiting` of the work tells a
    start after an orderly stop where to go on; claims: the stamps of its runs' claims (`claim_stamps`) before it."""

    work: StageQueue
    slot: Slot
    folder: Path
    signal_s: float
    claims: Mapping[Path, int | None] | None = None
    _local: LocalExecutor | None = None
    _terminated: bool = False

    def __call__(self) -> StageQueue:
        """Return the work, done. A job that Slurm ends itself (scancel, scontrol requeue) leaves no result.

        Raises UserError where the job could not put itself back into the queue, as in a container without Slurm.
        """
        if shutil.which("scontrol") is None:
            raise UserError("no scontrol in the job, which puts it back into the queue: bring Slurm into the container")
        signal.signal(signal.SIGTERM, self._on_term)  # in place of submitit's, which only notes it
        self._note(event="start", node=socket.gethostname())
        self.work.started = 0.0  # the clock of another machine
        self._wait_for_locks()
        self.work.waiting = [self._once(stage) for stage in self.work.waiting]
        self._local = LocalExecutor([self.slot])
        self._local.submit(self.work, self._local.free_slot())
        told = None
        while True:
            if self.work.log_path != told:
                told = self.work.log_path
                self._note(event="stage", log=str(told))
            if self._local.wait(1.0):
                break
        if self._terminated:
            raise SystemExit(128 + signal.SIGTERM)
        return self.work

    def checkpoint(self) -> Any:
        """Have the running stage end in order, and return the rest; submitit calls it on USR1, from its handler."""
        from submitit.helpers import DelayedSubmission

        started = time.monotonic()
        number = signal.SIGUSR1 if self.work.waiting and self.work.waiting[0].name == "train" else signal.SIGTERM
        while groups := [group for group in (self._local.groups() if self._local else ()) if group_lives(group)]:
            if time.monotonic() - started > self.signal_s - RESERVE_S:
                number = signal.SIGKILL
            for group in groups:
                os.killpg(group, number)
            again = time.monotonic() + AGAIN_S
            while time.monotonic() < again and any(map(group_lives, groups)):
                time.sleep(0.1)
        self.work.seconds += time.monotonic() - self.work.started if self.work.started else 0.0
        self._note(event="stopped", by=number.name)
        return DelayedSubmission(StageJob(self.work, self.slot, self.folder, self.signal_s, self.claims))

    def _once(self, stage: Stage) -> Stage:
        """Return the stage without overwrite=true where an earlier start has begun its run anew: what is there now is
        this work's own, and goes on."""
        if OVERWRITE not in stage.call.settings or self.claims is None:
            return stage
        if claim_stamps(stage.run_paths) == {path: self.claims.get(path) for path in stage.run_paths}:
            return stage
        settings = tuple(word for word in stage.call.settings if word != OVERWRITE)
        return dataclasses.replace(stage, call=dataclasses.replace(stage.call, settings=settings))

    def _on_term(self, number: int, frame: object) -> None:
        """Slurm sends it to the stage's processes, too: what they leave is no failure of theirs."""
        if not self._terminated:
            self._terminated = True
            self._note(event="terminated")

    def _wait_for_locks(self) -> None:
        """Wait until nobody trains the runs: the node of an earlier start may have come back with what ran there."""
        deadline = time.monotonic() + LOCK_WAIT_S
        for path in map(training_lock_path, self.work.run_paths):
            while path.is_file() and (lock := try_lock(path)) is None and time.monotonic() < deadline:
                time.sleep(1.0)
            if path.is_file() and lock is not None:
                lock.close()

    def _note(self, **event: object) -> None:
        array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
        job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
        append_line(self.folder / f"{job}_events.jsonl", event)


def claim_stamps(run_paths: Iterable[Path]) -> dict[Path, int | None]:
    """Return when each run's claim was last written, by its file system's clock; None where there is none."""
    claims = {path: path / CLAIM for path in run_paths}
    return {path: claim.stat().st_mtime_ns if claim.is_file() else None for path, claim in claims.items()}


def unmoved_by_usr1(stage: Stage) -> Stage:
    """Return the stage with a launcher that USR1 does not end: Slurm sends it to every process of a job, and only a
    training listens to it."""
    launch = (*UNMOVED, *stage.call.launch)
    return dataclasses.replace(stage, call=dataclasses.replace(stage.call, launch=launch))
