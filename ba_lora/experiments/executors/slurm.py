"""A Slurm cluster: `SlurmExecutor` gives each work to submitit as a job, what can start together as one array.

The grid's folder lies on a file system that all nodes share. In it, below slurm/:

    <run>.json          which job has the run: written before the job is submitted and completed after, so that a grid
                        that was killed in between finds that job by its name; removed when its end is written down
    <key>/              submitit's files of one array, its jobs' own output, and <job>_events.jsonl: each start with its
                        node, each stage with its log, each orderly stop

A job is a LocalExecutor on its node (`StageJob`). Before its time limit, and on preemption where the site has it so,
Slurm sends USR1: the training saves a checkpoint and ends, submitit puts the job back into the queue, and the next
start goes on from there. A job that SIGTERM has ended without being cancelled was preempted: it is submitted again.
A start that no orderly stop explains followed a failure of the node: that is counted and told, and is no error before
there have been more than `max_node_failures`.
"""

import dataclasses
import os
import pwd
import shlex
import shutil
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ba_lora.errors import UserError
from ba_lora.experiments.executors.base import Busy, Executor, Slot, StageFailure, StageQueue
from ba_lora.experiments.executors.slurm_settings import SlurmSettings, outside_any_job
from ba_lora.experiments.stage_job import SIGNAL, UNMOVED, StageJob, claim_stamps, unmoved_by_usr1
from ba_lora.io import disk_errors, read_object, read_whole_lines, write_json_atomic
from ba_lora.paths import PROJECT_ROOT, user_folder

JOB_NAME = "ba_lora"
GONE_AFTER = 2  # looks at the queue that agree before a job without a result counts as ended
REQUEUED = ("TIMEOUT", "PREEMPTED", "DEADLINE")  # ends that a job without its own requeue may come to
OF_THE_NODE = ("NODE_FAIL", "BOOT_FAIL", "LOST")
UNREADABLE = "its result cannot be read: it is of other code"
TAKEN_OVER = ("waiting", "failures", "seconds", "log_path")  # what a job has changed in its work
UNENDED = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESIZING",
           "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "SPECIAL_EXIT", "REVOKED")  # fmt: skip


@dataclass
class _Given:
    """A work that Slurm has, or is about to get (`job` is None)."""

    work: StageQueue
    slot: Slot
    key: str = ""
    job: str | None = None
    told: int = 0  # events that have been read
    last_event: str = ""
    node_failures: int = 0  # after which Slurm itself has begun the job again
    gone: int = 0  # looks at the queue that did not find it, or found it ended
    ends: Counter[str] = field(default_factory=Counter)  # how earlier jobs of the work ended
    claims: Mapping[Path, int | None] | None = None  # see StageJob


class SlurmExecutor(Executor):
    """Gives works to Slurm, and watches the queue; see this file's head and configs/executors/slurm.yaml."""

    settings_kind = SlurmSettings

    @classmethod
    def open(cls, settings: SlurmSettings, *, folder: Path, gpus: int, workers: int | None) -> Self:
        settings = settings.checked(gpus=gpus, workers=workers)
        import submitit

        if submitit.SlurmExecutor.affinity() < 0:
            raise UserError("executor slurm: there is no srun here: run it on a node of the cluster, such as its login")
        return cls(settings, folder / "slurm")

    def __init__(self, settings: SlurmSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self._given: list[_Given] = []
        self._empty: list[StageQueue] = []  # works without a stage
        self._next_look = 0.0
        self._answers = True  # whether Slurm's controller did when it was last asked
        self._failed_nodes: dict[str, int] = {}  # job → how often its node failed: two works may share a job

    @property
    def node_failures(self) -> int:
        return sum(self._failed_nodes.values())

    @property
    def places(self) -> list[str]:
        return [f"job {number + 1}" for number in range(self.settings.jobs_at_once)]

    def free_slot(self) -> Slot | None:
        """Return a place in the queue: as many works as there are go into the next array, while not all of the jobs
        that may run at once are taken, and as long as the queue may hold more of them."""
        submitted = sum(given.job is not None for given in self._given)
        if submitted >= self.settings.jobs_at_once or len(self._given) >= self.settings.jobs_queued:
            return None
        return Slot("Slurm", {"BA_LORA_FOLDER": str(user_folder())}, num_gpus=self.settings.gpus)

    def submit(self, work: StageQueue, slot: Slot) -> None:
        if not work.stages:  # all that is left is to write its result
            self._empty.append(work)
            return
        work.started = time.monotonic()
        work.queued, work.place = True, "about to be submitted"
        self._given.append(_Given(work, slot, claims=claim_stamps(work.run_paths)))

    def find(self, run_path: Path) -> StageQueue | None:
        """See Executor.find. A job that was submitted by a grid that died before it knew the job's number is ended."""
        record = read_object(self._record_path(run_path))
        if record is None:
            return None
        key, job = record.get("key"), record.get("job")
        lost = _listed(["squeue", "-h", "-r", "-n", f"{JOB_NAME}-{key}", "-o", "%i"]) if job is None else None
        if job is None and lost is None:
            raise Busy(f"Slurm's controller does not say whether it has the job {JOB_NAME}-{key}")
        job_call = None if job is None else self._submitted(key, job)
        if job_call is None:
            for number in [one for one in lost if one not in self._known(key)] if job is None else [job]:
                if not _cancel(number):
                    raise Busy(f"Slurm does not cancel the job {number}, whose work cannot be read")
            self._record_path(run_path).unlink(missing_ok=True)
            return None
        work = job_call.work
        work.started, work.place, work.queued = time.monotonic(), f"job {job}", True
        self._given.append(_Given(work, job_call.slot, key, job, claims=job_call.claims))
        self._next_look = 0.0
        return work

    def wait(self, timeout_s: float) -> list[StageQueue]:
        if self._empty:
            empty, self._empty = self._empty, []
            return empty
        self._submit_waiting()
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < self._next_look:
            if (left := deadline - time.monotonic()) <= 0:
                return []
            time.sleep(min(left, 0.2))
        self._next_look = time.monotonic() + self.settings.poll_seconds
        ended = self._look()
        self._given = [given for given in self._given if not any(given is one for one in ended)]
        return [given.work for given in ended]

    def forget(self, work: StageQueue, run_path: Path) -> None:
        record = read_object(self._record_path(run_path)) or {}
        self._record_path(run_path).unlink(missing_ok=True)
        others = (read_object(self._record_path(path)) or {} for path in work.run_paths)
        if record.get("job") and not work.failures and record["job"] not in [one.get("job") for one in others]:
            folder = self.folder / str(record["key"])
            for file in folder.glob(f"{record['job']}_*"):
                file.unlink(missing_ok=True)
            if not any(folder.glob("*.pkl")):
                shutil.rmtree(folder, ignore_errors=True)

    def cancel(self, *, jobs: bool = False) -> list[str]:
        given = [one for one in self._given if one.job is not None]
        names = ", ".join(one.job for one in given[:8]) + (" …" if len(given) > 8 else "")
        if not given:
            return []
        if not jobs:
            return [f"{len(given)} jobs go on in Slurm ({names}): the same command finds them again"]
        done = _ask(["scancel", *(one.job for one in given)])
        if done is None or done.returncode != 0:
            why = ((done.stderr if done else "").strip().splitlines() or ["it does not answer"])[-1]
            return [f"{len(given)} jobs may go on in Slurm ({names}): scancel failed: {why}"]
        for one in given:
            for path in one.work.run_paths:
                self._record_path(path).unlink(missing_ok=True)
        return [f"{len(given)} jobs are cancelled ({names})"]

    # ---- giving

    def _submit_waiting(self) -> None:
        """Give Slurm what waits, as one array: all of it where it has no job, of which it may run as many as may run at
        once, else as many as there is room for beside the others, since an array's bound stays as it is."""
        waiting = [given for given in self._given if given.job is None]
        others = len(self._given) - len(waiting)
        room = self.settings.jobs_at_once - others
        if not waiting or room <= 0 or not self._answer(waiting[0], queue_states()):
            return
        if others:
            waiting = waiting[:room]
        key = uuid.uuid4().hex[:12]
        folder = self.folder / key
        with disk_errors(folder):
            folder.mkdir(parents=True)
            for given in waiting:
                given.key = key
                self._write_records(given)
        # whatever fails now: sbatch may have accepted the jobs, the records let `find` look them up by their name
        jobs = self._array([self._job_call(given, folder) for given in waiting], folder, key, room)
        for given, job in zip(waiting, jobs, strict=True):
            given.job, given.told, given.gone, given.last_event = job, 0, 0, ""
            given.work.queued, given.work.place = True, f"job {job}"
            given.work.news.append(f"job {job}")
            self._write_records(given)
        self._next_look = 0.0

    def _job_call(self, given: _Given, folder: Path) -> StageJob:
        work = dataclasses.replace(given.work, locks=[], stages=[unmoved_by_usr1(one) for one in given.work.waiting])
        work.news, work.log_path = [], None
        return StageJob(work, given.slot, folder, self.settings.signal_seconds, given.claims)

    def _array(self, calls: Sequence[StageJob], folder: Path, key: str, at_once: int) -> list[str]:
        """Submit the calls; return the jobs' numbers."""
        import submitit

        submitit.JobEnvironment.USR_SIG = SIGNAL  # sbatch's --signal; the variable is read at the first import only
        chosen = self.settings
        container = [chosen.container] if chosen.container else []
        # until submitit listens to USR1 it would end the job
        python = " ".join([shlex.join(UNMOVED), *container, shlex.quote(sys.executable)])
        executor = submitit.SlurmExecutor(folder, max_num_timeout=chosen.max_timeouts, python=python)
        named = {key: getattr(chosen, key) for key in ("partition", "account", "qos", "constraint")}
        named |= {"mem": chosen.memory, "cpus_per_task": chosen.cpus}
        cpus = chosen.sbatch.get("cpus_per_task", chosen.cpus)
        if not {"gres", "gpus", "gpus_per_task"} & chosen.sbatch.keys():  # which name them another way
            named["gpus_per_node"] = chosen.gpus or None
        executor.update_parameters(
            job_name=f"{JOB_NAME}-{key}",
            time=chosen.time_minutes,
            signal_delay_s=chosen.signal_seconds,
            array_parallelism=at_once,
            ntasks_per_node=1,
            stderr_to_stdout=True,
            wckey=None,  # submitit's own word for it is refused where wckeys are checked
            # since Slurm 22.05 srun does not take them over from sbatch
            srun_args=[f"--cpus-per-task={cpus}"] if cpus else [],
            setup=[
                f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}",
                *(["command -v module >/dev/null || . /etc/profile"] if chosen.modules else []),
                *(f"module load {shlex.quote(name)} || exit 1" for name in chosen.modules),
                *chosen.setup,
            ],
            additional_parameters={"requeue": True, "chdir": str(PROJECT_ROOT), **chosen.sbatch},
            **{key: value for key, value in named.items() if value is not None},
        )
        try:
            with outside_any_job(), executor.batch():
                jobs = [executor.submit(call) for call in calls]
        except Exception as error:  # submitit's own classes, and what it lets through
            last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise UserError(f"executor slurm: sbatch refuses: {last.removeprefix('sbatch: ')}") from error
        return [job.job_id for job in jobs]

    # ---- watching

    def _look(self) -> list[_Given]:
        """Ask the queue, once for all jobs, and return the works that have ended."""
        given = [one for one in self._given if one.job is not None]
        if not given:
            return []
        states = queue_states()
        self._answer(given[0], states)
        return [one for one in given if self._has_ended(one, states)]

    def _answer(self, given: _Given, states: Mapping[str, tuple[str, str, str]] | None) -> bool:
        """Return whether Slurm's controller answers, and tell once that it does not."""
        if states is None and self._answers:
            given.work.news.append("Slurm's controller does not answer: waiting for it")
        self._answers = states is not None
        return self._answers

    def _has_ended(self, given: _Given, states: Mapping[str, tuple[str, str, str]] | None) -> bool:
        self._read_events(given)
        outcome = _outcome(self.folder / given.key, given.job)
        if outcome is not None and outcome[0] != UNREADABLE:
            return self._take(given, *outcome)
        if states is None:
            return False
        failures = given.node_failures + sum(given.ends[kind] for kind in OF_THE_NODE)
        if failures > self.settings.max_node_failures and _cancel(given.job):
            return self._fail(given, f"{failures} node failures; raise executor.max_node_failures, or retry=true")
        state, node, reason = states.get(given.job, ("", "", ""))
        if state in UNENDED:
            given.gone = 0
            given.work.queued = state != "RUNNING"
            where = f"on {node}" if state == "RUNNING" else f"{state.lower()} ({reason})"
            given.work.place = f"job {given.job} {where}"
            return False
        given.gone += 1
        if given.gone < GONE_AFTER:  # its result may be on its way through the file system
            return False
        ended = UNREADABLE if outcome else state or _accounted_state(given.job) or "LOST"
        return ended not in UNENDED and self._settle(given, ended)

    def _take(self, given: _Given, outcome: str, result: Any) -> bool:
        """Take over what a job has returned."""
        if outcome == "success":
            for name, value in result.items():
                setattr(given.work, name, value)
            return True
        last = (str(result).strip().splitlines() or ["no reason given"])[-1]
        return self._fail(given, f"its job {given.job} ended: {last}")

    def _settle(self, given: _Given, state: str) -> bool:
        """Decide on a job that ended without a result: again, or a failure."""
        if state == "FAILED" and given.last_event == "terminated":  # in the grace time that a site gives the preempted
            state = "PREEMPTED"
        given.ends[state] += 1
        timeouts, failures = (sum(given.ends[one] for one in kinds) for kinds in (REQUEUED, OF_THE_NODE))
        if state in OF_THE_NODE:
            self._failed_nodes[given.job] = given.node_failures + 1
        if (
            (state in REQUEUED and timeouts <= self.settings.max_timeouts)
            or (state in OF_THE_NODE and failures + given.node_failures <= self.settings.max_node_failures)
            or (state == UNREADABLE and given.ends[state] == 1)
        ):
            given.work.news.append(f"job {given.job} ended ({state}): submitted again")
            if (call := self._submitted(given.key, given.job)) is not None:
                for name in ("waiting", "failures", "seconds"):
                    setattr(given.work, name, getattr(call.work, name))
            given.job, given.work.queued = None, True
            given.ends["NODE_FAIL"] += given.node_failures
            given.told = given.node_failures = 0
            return False
        return self._fail(given, f"its job {given.job} ended without a result: {state}")

    def _fail(self, given: _Given, error: str) -> bool:
        """Let each run of the work fail by itself: nobody's fault is to be found out."""
        stage = (given.work.waiting or given.work.stages)[0]
        log = self.folder / given.key / f"{given.job}_0_log.out"
        for path in given.work.run_paths:
            own = dataclasses.replace(stage, run_paths=(path,), task=None)
            given.work.failures.setdefault(path, []).append(StageFailure(own, 1, log, error))
        return True

    def _read_events(self, given: _Given) -> None:
        """Read what the job has noted since: where it began, which log it writes, how it was stopped."""
        path = self.folder / given.key / f"{given.job}_events.jsonl"
        events = read_whole_lines(path)
        for event in events[given.told :]:
            if event["event"] == "stage":
                given.work.log_path = Path(event["log"])
                continue
            given.last_event = event["event"]
            if event["event"] == "start":
                given.work.news.append(f"job {given.job} started on {event['node']}")
            elif event.get("by") == "SIGKILL":
                given.work.news.append(
                    f"job {given.job} was killed before it had saved, and starts again from its last checkpoint: raise "
                    "executor.signal_seconds"
                )
            else:
                given.work.news.append(f"job {given.job} {event['event']}: it goes back into the queue, or ends")
        given.told = len(events)
        if (failures := _node_failures(events)) > given.node_failures:
            given.node_failures = self._failed_nodes[given.job] = failures
            given.work.news.append(f"job {given.job}: its node had failed")

    # ---- records

    def _record_path(self, run_path: Path) -> Path:
        return self.folder / f"{run_path.name}.json"

    def _known(self, key: str) -> set[str | None]:
        """Return the jobs of one submission whose numbers were written down."""
        records = [read_object(path) or {} for path in self.folder.glob("*.json")]
        return {record.get("job") for record in records if record.get("key") == key}

    def _write_records(self, given: _Given) -> None:
        for path in given.work.run_paths:
            write_json_atomic(self._record_path(path), {"key": given.key, "job": given.job})

    def _submitted(self, key: str, job: str) -> StageJob | None:
        """Return what was submitted, as the job's last orderly stop has left it; None where it cannot be read."""
        import submitit

        try:
            return submitit.SlurmJob(self.folder / key, job).submission().function
        except Exception:  # a missing or damaged pickle, or one of other code: the work is done again
            return None


def queue_states() -> dict[str, tuple[str, str, str]] | None:
    """Return job → (state, nodes, reason) of this user's jobs, ended ones as long as Slurm remembers; None where its
    controller does not answer."""
    lines = _listed(["squeue", "-h", "-r", "-t", "all", "-u", pwd.getpwuid(os.getuid()).pw_name, "-o", "%i|%T|%N|%r"])
    if lines is None:
        return None
    found = (line.split("|", 3) for line in lines)
    return {job: (state, node, reason) for job, state, node, reason in found}


def _cancel(job: str) -> bool:
    """Cancel a job; return whether it has ended, or is about to."""
    done = _ask(["scancel", job])
    if done is not None and done.returncode == 0:
        return True
    states = queue_states()
    return states is not None and states.get(job, ("", "", ""))[0] not in UNENDED


def _accounted_state(job: str) -> str | None:
    """Return how a job ended by Slurm's accounting, None where there is none."""
    lines = _listed(["sacct", "-n", "-X", "-P", "-j", job, "-o", "State"])
    return lines[0].split()[0] if lines and lines[0].split() else None


def _listed(command: Sequence[str]) -> list[str] | None:
    done = _ask(command)
    return done.stdout.splitlines() if done is not None and done.returncode == 0 else None


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None


def _outcome(folder: Path, job: str) -> tuple[str, Any] | None:
    """Return what a job has written as its result: ("success", what it changed in its work) or ("error", a traceback);
    (UNREADABLE, why) for what this code cannot read, be it of other code or still on its way; None: nothing yet."""
    import submitit
    from submitit.core.utils import pickle_load

    path = submitit.SlurmJob(folder, job).paths.result_pickle
    if not path.is_file():
        return None
    try:
        outcome, result = pickle_load(path)
        return outcome, {name: getattr(result, name) for name in TAKEN_OVER} if outcome == "success" else result
    except Exception as error:  # whatever a pickle raises whose modules or classes have changed
        return UNREADABLE, error


def _node_failures(events: Sequence[Mapping[str, Any]]) -> int:
    """Return how many starts neither were the first nor followed an orderly stop or Slurm's own SIGTERM."""
    kinds = [event["event"] for event in events if event["event"] != "stage"]
    return sum(kind == before == "start" for before, kind in zip(kinds, kinds[1:], strict=False))


EXECUTOR = SlurmExecutor
