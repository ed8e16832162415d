"""`WarmExecutor`: stages forked from one process that has imported everything, for runs that are shorter than the
imports of torch, transformers and PEFT (10 to 16 s of CPU here). On the CPU only: a GPU's context cannot be forked.

Python's fork server does it. A stage is the script or module with its words, as `LocalExecutor` would start it. A
thread in it waits for the end of the process that asked for it, and ends the stage then: kill -9 leaves none behind.
What is measured of a stage's memory includes all that has been imported, so it is no more than a bound.
"""

import atexit
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from ba_lora.errors import UserError
from ba_lora.experiments.executors.local import LocalExecutor, Slot
from ba_lora.experiments.stages import Stage
from ba_lora.io import disk_errors
from ba_lora.paths import PROJECT_ROOT, stage_environment

IMPORTED = "ba_lora.experiments.executors.warmed"


class WarmExecutor(LocalExecutor):
    """A LocalExecutor whose training scripts start in milliseconds, once the first has."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        if any(slot.num_gpus for slot in slots):
            raise UserError("warm is for the CPU (a GPU's context cannot be forked): take it out")
        super().__init__(slots)
        if threads := {slot.environment.get("OMP_NUM_THREADS") for slot in slots} - {None}:
            os.environ.setdefault("OMP_NUM_THREADS", min(threads))  # BLAS reads it in the server, when it is imported
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([IMPORTED])

    def start_process(
        self, stage: Stage, slot: Slot, log_path: Path, locks: Sequence[IO[str]], *, append: bool = False
    ) -> subprocess.Popen:
        call = stage.call
        if call.launch not in ((sys.executable,), (sys.executable, "-m")):
            return super().start_process(stage, slot, log_path, locks, append=append)
        with disk_errors(log_path):
            log_path.touch()
        environment = {**stage_environment(), **slot.environment}
        words = (call.module, call.words, "-m" in call.launch, environment, str(log_path), append)
        process = self._context.Process(target=_run, args=words)
        process.start()
        return _Started(process)


class _Started:
    """A forked process with the methods of Popen that LocalExecutor calls."""

    def __init__(self, process: multiprocessing.Process) -> None:
        self._process = process
        self.pid = process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked stage", timeout)
        return self._process.exitcode


def _run(
    name: str, words: list[str], is_module: bool, environment: dict[str, str], log_path: str, append: bool
) -> None:
    """Be the script or module: in a session of its own, with its output in the log."""
    os.setsid()
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process().sentinel,), daemon=True).start()
    multiprocessing.set_start_method("fork", force=True)  # Linux's own, and not the fork server's, for what it starts
    log = os.open(log_path, os.O_WRONLY | (os.O_APPEND if append else os.O_TRUNC))
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", buffering=1, encoding="utf-8", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(PROJECT_ROOT)
    if environment.get("OMP_NUM_THREADS", "").isdecimal():  # torch has read it when it was imported
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [name, *words]
    try:
        if is_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a forked process leaves without them
        sys.stdout.flush()
        sys.stderr.flush()


def _end_with(sentinel: int) -> None:
    """Kill the stage and what it has started when the process behind `sentinel` has ended."""
    multiprocessing.connection.wait([sentinel])
    os.killpg(0, signal.SIGKILL)


EXECUTOR = WarmExecutor
