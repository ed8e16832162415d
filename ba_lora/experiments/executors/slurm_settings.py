"""What a file of configs/executors may say of a Slurm cluster; and what of a grid's own job must not reach its jobs."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ba_lora.errors import UserError
from ba_lora.experiments.stage_job import RESERVE_S

OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")  # variables that Slurm sets for what runs in a job
OWN_OPTIONS = {
    "array",
    "chdir",
    "error",
    "job_name",
    "nodes",
    "ntasks_per_node",
    "open_mode",
    "output",
    "requeue",
    "signal",
    "time",
}  # of sbatch: watching and requeueing hang on them; the last two have settings


@dataclass(frozen=True)
class SlurmSettings:
    """What configs/executors/slurm.yaml describes. gpus: of a job; None: as many as the table's rows are set for;
    sbatch: by sbatch's names of its options, over the others."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus: int | None = None
    cpus: int | None = None
    memory: str | None = None
    time_minutes: int = 1440
    signal_seconds: int = 180
    jobs_at_once: int = 16
    jobs_queued: int = 100
    poll_seconds: int = 30
    max_timeouts: int = 100
    max_node_failures: int = 5
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    container: str | None = None
    sbatch: dict[str, Any] = field(default_factory=dict)

    def checked(self, *, gpus: int, workers: int | None) -> Self:
        """Return the settings of a grid whose rows have so many GPUs a run, `workers` of whose jobs may run at once.

        Raises UserError for a value that cannot be used.
        """
        for key, value in vars(self).items():
            least = 0 if key in ("gpus", "max_timeouts", "max_node_failures") else 1
            if isinstance(value, int) and value < least:
                raise UserError(f"executor slurm: {key}={value}: a whole number of at least {least} is needed")
        most = 60 * self.time_minutes
        if not RESERVE_S < self.signal_seconds < most:
            raise UserError(
                f"executor slurm: signal_seconds={self.signal_seconds}: more than {RESERVE_S:.0f} and less than "
                f"{most}, the time limit, is needed: a training saves its checkpoint in it"
            )
        at_once = self.jobs_at_once if workers is None else workers
        if at_once > self.jobs_queued:
            raise UserError(
                f"executor slurm: {at_once} jobs at once, but jobs_queued={self.jobs_queued}: raise "
                "executor.jobs_queued, which counts those that run, too"
            )
        if self.gpus not in (None, 0, gpus):
            raise UserError(
                f"executor slurm: gpus={self.gpus}: the table's rows are set for {gpus} GPU(s) a run; choose "
                "others by gpus=N on the command line, or leave the executor's out"
            )
        own = {"gpus": gpus if self.gpus is None else self.gpus, "jobs_at_once": at_once}
        return dataclasses.replace(self, **own, sbatch=_options(self.sbatch))


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return sbatch's options by submitit's names, without those that are switched off.

    Raises UserError for those that the executor sets itself.
    """
    named = {key.replace("-", "_"): value for key, value in options.items() if value is not None and value is not False}
    if owned := sorted(OWN_OPTIONS & named.keys()):
        raise UserError(
            f"executor slurm: sbatch: {owned[0]} is set by the executor itself (time_minutes, signal_seconds and "
            "jobs_at_once are its settings); leave it out"
        )
    return named


@contextlib.contextmanager
def outside_any_job() -> Iterator[None]:
    """Take a job's variables out of the environment: sbatch would hand those of the grid's own job to the new one."""
    kept = {name: os.environ[name] for name in list(os.environ) if name.startswith(OF_A_JOB) and name != "SLURM_CONF"}
    for name in kept:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(kept)
