"""`WarmExecutor`: stages forked from one process that has imported everything, for runs that are shorter than the
imports of torch, transformers and PEFT (10 to 16 s of CPU here). On the CPU only: a GPU's context cannot be forked.

Python's fork server does it. A stage is the script or module with its words, as `LocalExecutor` would start it. It ends
with the fork server, which ends with this process: kill -9 leaves none behind.
"""

import ctypes
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from ba_lora.errors import UserError
from ba_lora.experiments.executors.local import LocalExecutor, Slot
from ba_lora.experiments.stages import Stage
from ba_lora.io import disk_errors
from ba_lora.paths import PROJECT_ROOT, stage_environment

PR_SET_PDEATHSIG = 1  # of Linux's prctl
IMPORTED = "ba_lora.experiments.executors.warmed"


class WarmExecutor(LocalExecutor):
    """A LocalExecutor whose training scripts start in milliseconds, once the first has."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        if any(slot.num_gpus for slot in slots):
            raise UserError("warm is for the CPU (a GPU's context cannot be forked): take it out")
        super().__init__(slots)
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
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
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
        sys.stdout.flush()
        sys.stderr.flush()


EXECUTOR = WarmExecutor
