"""This machine: `LocalExecutor`, one worker for each GPU (or group of GPUs), or on the CPU.

A stage inherits the locks of its work. So if the grid is killed with -9, a stage that lives on keeps its run (and its
GPUs) to itself until it ends, and the next grid waits for it. What a stage has started ends with it: a child that it
left behind would keep these locks, and its GPU's memory, too.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import psutil

from ba_lora.errors import UserError
from ba_lora.experiments.executors.base import Executor, Slot, StageQueue, release
from ba_lora.experiments.stages import Stage
from ba_lora.io import disk_errors
from ba_lora.locks import holder, try_lock
from ba_lora.paths import PROJECT_ROOT, stage_environment

POLL_S = 0.05
GRACE_S = 30.0  # between SIGTERM and SIGKILL; a training records that it was cancelled
CHILDREN_GRACE_S = 2.0  # for what an ended stage leaves behind: multiprocessing's tracker unlinks shared memory
KILLED_S = 30.0  # for killed children to be gone; no signal ends one that hangs in a driver


@dataclass
class _Job:
    work: StageQueue
    slot: Slot
    slot_locks: list[IO[str]]
    stage: Stage | None = None
    process: subprocess.Popen | None = None
    stage_ended: float | None = None  # by the monotonic clock; its children may live on


class LocalExecutor(Executor):
    """Runs work in child processes of this one, one work a slot."""

    on_this_machine = True

    @classmethod
    def open(cls, settings: Any, *, folder: Path, gpus: int, workers: int | None) -> Self:
        return cls(local_slots(folder, gpus_per_run=gpus, workers=workers))

    @property
    def places(self) -> list[str]:
        return [slot.name for slot in self.slots]

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)
        self._jobs: list[_Job] = []
        self._slot_locks: list[IO[str]] = []  # of the slot that `free_slot` has just given
        self._held_elsewhere: dict[str, str] = {}  # slot → who has a GPU of it

    def free_slot(self) -> Slot | None:
        """Return a slot that nobody uses, neither this grid nor, of its GPUs, another one on this machine."""
        used = {job.slot.name for job in self._jobs}
        self._held_elsewhere = {}
        for slot in self.slots:
            if slot.name not in used and self._take(slot):
                return slot
        return None

    def _take(self, slot: Slot) -> bool:
        """Take the locks of all the slot's GPUs, or none."""
        self._release_slot()
        for path in slot.lock_paths:
            lock = try_lock(path)
            if lock is None:
                self._held_elsewhere[slot.name] = holder(path)
                self._release_slot()
                return False
            self._slot_locks.append(lock)
        return True

    def busy_elsewhere(self) -> list[str]:
        """Return who held the GPUs that this grid could not have when it last asked for a slot."""
        return [f"{name}: {who}" for name, who in self._held_elsewhere.items()]

    def submit(self, work: StageQueue, slot: Slot) -> None:
        """Start the work on the slot that `free_slot` has just given."""
        job = _Job(work, slot, self._slot_locks)
        work.started = time.monotonic()
        self._slot_locks = []
        self._jobs.append(job)
        self._advance(job)

    def wait(self, timeout_s: float) -> list[StageQueue]:
        """Return the work that has ended, after `timeout_s` at the latest."""
        self._release_slot()
        deadline = time.monotonic() + timeout_s
        while True:
            ended = [job for job in self._jobs if self._advance(job)]
            if ended or time.monotonic() >= deadline:
                break
            time.sleep(POLL_S)
        for job in ended:
            self._close(job)
        return [job.work for job in ended]

    def groups(self) -> list[int]:
        """Return the process groups of the stages that run."""
        return [job.process.pid for job in self._jobs if job.process is not None]

    def cancel(self, *, jobs: bool = False) -> list[str]:
        """End what still runs: SIGTERM, then, for what does not listen, SIGKILL."""
        for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
            deadline = time.monotonic() + patience_s
            alive = [job.process for job in self._jobs if job.process is not None and job.process.poll() is None]
            for process in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            for process in alive:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.0, deadline - time.monotonic()))
        started = [job for job in self._jobs if job.process is not None]
        while not all([_children_ended(job) for job in started]):
            time.sleep(POLL_S)
        for job in list(self._jobs):
            self._close(job)
        return []

    def _advance(self, job: _Job) -> bool:
        """Start the job's next stage if the one before has ended; return whether there is none left."""
        if job.process is not None:
            status = job.process.poll()
            if status is None or not _children_ended(job):
                return False
            job.work.waiting.pop(0)
            if status != 0:
                job.work.fail(job.stage, status, job.work.log_path)
            job.process = job.stage_ended = None
        while job.work.waiting:
            job.stage = job.work.waiting[0]
            if not any(map(job.work.goes_on, job.stage.run_paths)):
                job.work.waiting.pop(0)
                continue
            log_name = f"{job.stage.run_paths[0].name}.{re.sub('[ /]', '-', job.stage.name)}.log"  # harness/TASK
            job.work.log_path = job.work.log_folder / log_name
            locks, goes_on = [*job.work.locks, *job.slot_locks], job.work.seconds > 0
            job.process = self.start_process(job.stage, job.slot, job.work.log_path, locks, append=goes_on)
            return False
        job.work.seconds += time.monotonic() - job.work.started
        return True

    def start_process(
        self, stage: Stage, slot: Slot, log_path: Path, locks: Sequence[IO[str]], *, append: bool = False
    ) -> subprocess.Popen:
        """Start a stage in a process group of its own, which holds the locks until it ends."""
        with disk_errors(log_path), open(log_path, "ab" if append else "wb") as log:
            return subprocess.Popen(
                stage.call.command,
                cwd=PROJECT_ROOT,
                env={**stage_environment(), **slot.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno() for lock in locks],
                start_new_session=True,  # only the grid gets Ctrl-C, which then ends its stages in order
            )

    def _close(self, job: _Job) -> None:
        self._jobs.remove(job)
        release(job.slot_locks)

    def _release_slot(self) -> None:
        release(self._slot_locks)


def _children_ended(job: _Job) -> bool:
    """Return whether an ended stage has left nothing of its process group, such as an engine's workers after the OOM
    killer; call it until then.

    What is left is killed after a while. True also for a killed child that does not go: the grid goes on without it.
    """
    now = time.monotonic()
    if job.stage_ended is None:
        job.stage_ended = now
    if not group_lives(job.process.pid):
        return True
    overdue_s = now - job.stage_ended - CHILDREN_GRACE_S
    if overdue_s >= 0:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
    return overdue_s >= KILLED_S


def group_lives(group: int) -> bool:
    """Return whether a process of the group still holds anything. A zombie does not, once its other threads are gone:
    in a container whose first process reaps none, it stays for good."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    for pid in psutil.pids():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(pid) == group:
                member = psutil.Process(pid)
                if member.status() != psutil.STATUS_ZOMBIE or member.num_threads() > 1:
                    return True
    return False


def local_slots(
    lock_folder: Path, *, gpus_per_run: int = 1, workers: int | None = None, environ: Mapping[str, str] = os.environ
) -> list[Slot]:
    """Return one slot for each group of `gpus_per_run` GPUs that this process may see, else `workers` on the CPU.

    A GPU has one lock whatever its group, so that grids with other groups do not meet on it. Without a GPU there are
    two workers where there are two cores, and the cores are shared out among them. Raises UserError for more GPUs a run
    than there are.
    """
    visible = _visible_gpus(environ)
    if gpus_per_run > max(1, len(visible)):
        raise UserError(
            f"gpus={gpus_per_run}: only {len(visible)} GPU(s) can be seen here; run it where there are more"
        )
    if visible:
        slots, known_as = [], _uuids(visible)
        for start in range(0, len(visible) - gpus_per_run + 1, gpus_per_run):
            members = visible[start : start + gpus_per_run]
            lock_paths = tuple(
                lock_folder / f"gpu-{socket.gethostname()}-{name}.lock"
                for name in sorted(known_as[member] for member in members)
            )
            named = ",".join(members)
            slots.append(Slot(f"GPU {named}", {"CUDA_VISIBLE_DEVICES": named}, lock_paths, gpus_per_run))
        return slots[:workers]
    cores = os.cpu_count() or 1
    number = min(2, cores) if workers is None else workers
    threads = environ.get("OMP_NUM_THREADS") or str(max(1, cores // number))
    return [Slot(f"CPU worker {index}", {"OMP_NUM_THREADS": threads}) for index in range(number)]


def _visible_gpus(environ: Mapping[str, str]) -> list[str]:
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _uuids(visible: Sequence[str]) -> dict[str, str]:
    """Return each visible GPU's UUID where nvidia-smi tells it, else its name: two jobs may both have a GPU 0."""
    try:
        command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        listed = []
    return {name: listed[int(name)] if name.isdigit() and int(name) < len(listed) else name for name in visible}


EXECUTOR = LocalExecutor
