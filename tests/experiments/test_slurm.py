"""The grid on a real Slurm of one node and two cores, started here: real jobs, most of them with stages of a moment.

What an executor does with a training is tested on a real one, too: USR1 in its middle, and the end as without it.
"""

import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import cloudpickle
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ba_lora.errors import UserError
from ba_lora.experiments import grid
from ba_lora.experiments.executors import slurm as slurm_executor
from ba_lora.experiments.executors.base import Busy, Slot, StageQueue
from ba_lora.experiments.executors.local import LocalExecutor
from ba_lora.experiments.executors.slurm import SlurmExecutor, SlurmSettings, queue_states
from ba_lora.experiments.spec import Spec
from ba_lora.experiments.stage_job import StageJob
from ba_lora.experiments.stages import Call, Stage, training_stage
from tests.support import slurm
from tests.workers import fake_grid

SETTINGS = {"gpus": 0, "time_minutes": 5, "signal_seconds": 30, "poll_seconds": 1}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := slurm.missing():
        pytest.skip(reason)
    with slurm.running(tmp_path_factory.mktemp("cluster") / "slurm") as started, pytest.MonkeyPatch.context() as patch:
        for name, value in started.environment.items():
            patch.setenv(name, value)
        yield started


@pytest.fixture
def folder(grid_folder):
    return grid_folder


def executor(**settings):
    return SlurmExecutor.open(SlurmSettings(**SETTINGS | settings), folder=grid.GRID_PATH, gpus=1, workers=None)


def trained(folder):
    return collections.Counter(line.split()[1] for line in fake_grid.ledger(folder) if line.startswith("train "))


def hold(folder, *runs):
    (folder / "hold").write_text("".join(f"train {run}\n" for run in runs))


def names_of(table):
    return [spec.config.run_path.name for spec in table.specs()]


def begun(table, run):
    """Whether the fake training of a run has read what it is to do: from then on it is held."""
    (spec,) = [spec for spec in table.specs() if spec.config.run_path.name == run]
    return (spec.config.run_path / "config.yaml").is_file()


def jobs_in(*states):
    return {job: state for job, (state, _, _) in queue_states().items() if state in states}


def events(run):
    """Return what the job of a run has noted."""
    record_path = grid.GRID_PATH / "slurm" / f"{run}.json"
    if not record_path.is_file():
        return []
    record = json.loads(record_path.read_text())
    path = grid.GRID_PATH / "slurm" / record["key"] / f"{record['job']}_events.jsonl"
    return [json.loads(line)["event"] for line in path.read_text().splitlines()] if path.is_file() else []


def test_a_controller_that_is_silent_forgets_no_job(tmp_path, monkeypatch):
    """Without a cluster: the answers of squeue, sbatch and scancel are set."""
    run = tmp_path / "run"
    made, record = SlurmExecutor(SlurmSettings(jobs_at_once=1), tmp_path), tmp_path / "run.json"
    record.write_text(json.dumps({"key": "k", "job": None}))
    monkeypatch.setattr(slurm_executor, "_listed", lambda command: None)
    with pytest.raises(Busy, match="does not say whether it has the job ba_lora-k"):
        made.find(run)
    assert record.is_file()
    monkeypatch.setattr(slurm_executor, "_listed", lambda command: [])
    assert made.find(run) is None and not record.exists()

    failed = subprocess.CompletedProcess([], 1, "", "scancel: error\n")
    monkeypatch.setattr(slurm_executor, "_ask", lambda command: failed)
    for ended, states in (
        (False, None),
        (False, {"7": ("RUNNING", "n", "")}),
        (True, {"7": ("FAILED", "n", "")}),
        (True, {}),
    ):
        record.write_text(json.dumps({"key": "k", "job": "7"}))  # its pickle is gone
        monkeypatch.setattr(slurm_executor, "queue_states", lambda states=states: states)
        if ended:
            assert made.find(run) is None and not record.exists()
        else:
            with pytest.raises(Busy, match="does not cancel the job 7"):
                made.find(run)
            assert record.is_file()
    record.write_text(json.dumps({"key": "k", "job": None}))

    def interrupted(*_):
        raise KeyboardInterrupt

    stage = Stage("train", Call("train"), (run,))
    made.submit(StageQueue([stage], tmp_path, []), Slot("Slurm", {}))
    monkeypatch.setattr(made, "_array", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made._submit_waiting()
    assert json.loads(record.read_text())["job"] is None  # sbatch may have accepted it

    made._given[0].job = "7"
    for done, told in (
        (1, "1 jobs may go on in Slurm (7): scancel failed: no contact"),
        (0, "1 jobs are cancelled (7)"),
    ):
        answer = subprocess.CompletedProcess([], done, "", "scancel: error\nno contact\n")
        monkeypatch.setattr(slurm_executor, "_ask", lambda command, answer=answer: answer)
        assert made.cancel(jobs=True) == [told] and record.exists() == bool(done)


def test_node_failures_are_counted_once_a_job_and_end_it_at_their_limit(tmp_path, monkeypatch):
    """Without a cluster. Slurm itself begins a job again whose node has failed, as often as it likes."""
    states, cancelled = {}, []
    made = SlurmExecutor(SlurmSettings(jobs_at_once=4, poll_seconds=0, max_node_failures=2), tmp_path)
    monkeypatch.setattr(slurm_executor, "queue_states", lambda: states)
    monkeypatch.setattr(slurm_executor, "_cancel", lambda job: not cancelled.append(job))
    jobs = iter(["7", "8", "9"])
    monkeypatch.setattr(made, "_array", lambda *_: [next(jobs)])
    for name in "abc":
        made.submit(StageQueue([Stage("train", Call("train"), (tmp_path / name,))], tmp_path, []), Slot("Slurm", {}))
        assert not made.wait(0.1)
        states[made._given[-1].job] = ("RUNNING", "node", "")
    first, second, third = made._given
    second.job, second.key = "7", first.key  # one job for two works, as of an evaluation that was found again

    def restarts(given, number):
        lines = [json.dumps({"event": "start", "node": "n"})] * (number + 1)
        (tmp_path / given.key / f"{given.job}_events.jsonl").write_text("\n".join(lines) + "\n")

    restarts(first, 1)
    assert not made.wait(0.1) and made.node_failures == 1
    restarts(third, 2)
    assert not made.wait(0.1) and made.node_failures == 3 and not cancelled
    made._given.remove(second)
    restarts(third, 3)
    (work,) = made.wait(0.1)
    assert work is third.work and cancelled == ["9"] and made.node_failures == 4
    assert "3 node failures; raise executor.max_node_failures" in work.failures[tmp_path / "c"][0].error
    states["7"] = ("NODE_FAIL", "node", "")
    assert not made.wait(0.1) and not made.wait(0.1)
    assert first.job is None and made.node_failures == 5  # a second time in this job, and submitted again
    jobs = iter(["10"])
    assert not made.wait(0.1) and first.job == "10"
    states["10"] = ("RUNNING", "node", "")
    restarts(first, 1)
    (work,) = made.wait(0.1)
    assert work is first.work and made.node_failures == 6 and cancelled == ["9", "10"]


class _Older(StageQueue):
    """A work as code without `failures` has pickled it."""

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "failures"}


OTHER_CODE = {"another module": b"cba_lora.gone\nWork\n.", "cut off": b"\x80\x05\x95", "another class": None}


@pytest.mark.parametrize("content", OTHER_CODE.values(), ids=OTHER_CODE)
def test_a_result_of_other_code_is_done_again_once(content, tmp_path, monkeypatch):
    """Without a cluster. While the job runs, what cannot be read yet is no result."""
    run, states = tmp_path / "run", {}
    made = SlurmExecutor(SlurmSettings(jobs_at_once=1, poll_seconds=0), tmp_path)
    monkeypatch.setattr(slurm_executor, "queue_states", lambda: states)
    jobs = iter("78")
    monkeypatch.setattr(made, "_array", lambda *_: [next(jobs)])
    stage = Stage("train", Call("train"), (run,))
    made.submit(StageQueue([stage], tmp_path, []), Slot("Slurm", {}))

    def ends(job):
        given = made._given[0]
        assert given.job == job
        result = content or cloudpickle.dumps(("success", _Older([stage], tmp_path, [])))
        (tmp_path / given.key / f"{job}_0_result.pkl").write_bytes(result)
        states[job] = ("RUNNING", "node", "")
        assert not made.wait(0.1) and not made.wait(0.1)
        states[job] = ("COMPLETED", "node", "")

    assert not made.wait(0.1)
    ends("7")
    assert not made.wait(0.1) and not made.wait(0.1)
    assert made._given[0].work.news[-1] == f"job 7 ended ({slurm_executor.UNREADABLE}): submitted again"
    assert not made.wait(0.1)
    ends("8")
    assert not made.wait(0.1)
    (work,) = made.wait(0.1)
    (failure,) = work.failures[run]
    assert failure.error == f"its job 8 ended without a result: {slurm_executor.UNREADABLE}"


def given_to_sbatch(tmp_path, monkeypatch, **settings):
    """Return the file that sbatch is given, and the environment it is called in. Without a cluster."""
    keep = f'cp "$1" {tmp_path}/given; env > {tmp_path}/environment; echo Submitted batch job 7'
    for name, line in (("srun", ""), ("sbatch", keep)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    made = SlurmExecutor.open(SlurmSettings(**settings), folder=tmp_path, gpus=4, workers=None)
    assert made._array([Call("train")], tmp_path / "jobs", "key", 1) == ["7"]
    return (tmp_path / "given").read_text(), (tmp_path / "environment").read_text()


def test_jobs_are_sent_the_signal_that_saves_whoever_imported_submitit_first(tmp_path, monkeypatch):
    """submitit's own choice is USR2, which ends the job."""
    import submitit

    monkeypatch.setattr(submitit.JobEnvironment, "USR_SIG", "USR2")
    given, _ = given_to_sbatch(tmp_path, monkeypatch, signal_seconds=30)
    assert "#SBATCH --signal=USR1@30" in given and "export SUBMITIT_PREEMPT_SIGNAL=USR1" in given


def test_a_job_has_the_sites_options_and_nothing_of_the_job_that_the_grid_runs_in(tmp_path, monkeypatch):
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_MEM_PER_NODE", "SLURMD_NODENAME", "SRUN_DEBUG", "SUBMITIT_EXECUTOR"):
        monkeypatch.setenv(name, "of the outer job")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    options = {"gpus-per-node": "a100:4", "nice": 100, "mem": 0, "exclusive": False, "comment": None}
    given, environment = given_to_sbatch(tmp_path, monkeypatch, sbatch=options, cpus=16, modules=("cuda/12.8",))
    lines = [line for line in given.splitlines() if line.startswith("#SBATCH")]
    assert [line for line in lines if "gpus" in line] == ["#SBATCH --gpus-per-node=a100:4"]
    assert "#SBATCH --nice=100" in lines and "#SBATCH --mem=0" in lines and "#SBATCH --cpus-per-task=16" in lines
    assert not any(word in line for line in lines for word in ("exclusive", "comment", "wckey"))
    assert "\nmodule load cuda/12.8 || exit 1\n" in given and " --cpus-per-task=16 " in given.rpartition("srun ")[2]
    assert "of the outer job" not in environment and "SLURM_CONF=/etc/slurm.conf" in environment
    assert os.environ["SLURM_ARRAY_JOB_ID"] == "of the outer job"
    given, _ = given_to_sbatch(tmp_path, monkeypatch, sbatch={"gres": "gpu:a100:4"})
    assert "gres=gpu:a100:4" in given and "gpus-per-node" not in given
    assert "#SBATCH --gpus-per-node=4" in given_to_sbatch(tmp_path, monkeypatch)[0]


def test_the_queue_holds_no_more_jobs_than_it_may(tmp_path):
    made = SlurmExecutor(SlurmSettings(jobs_queued=2), tmp_path)
    for name in "ab":
        made.submit(StageQueue([Stage("train", Call("train"), (tmp_path / name,))], tmp_path, []), made.free_slot())
    assert made.free_slot() is None


def test_a_job_that_ends_in_its_grace_time_is_submitted_again(tmp_path, monkeypatch):
    """Without a cluster. Most sites send SIGTERM to the preempted, and Slurm calls the job that it ended FAILED."""
    states = {}
    made = SlurmExecutor(SlurmSettings(poll_seconds=0, max_timeouts=1), tmp_path)
    monkeypatch.setattr(slurm_executor, "queue_states", lambda: states)
    jobs = iter("789")
    monkeypatch.setattr(made, "_array", lambda *_: [next(jobs)])
    run = tmp_path / "run"
    made.submit(StageQueue([Stage("train", Call("train"), (run,))], tmp_path, []), Slot("Slurm", {}))
    given = made._given[0]

    def ends(*events):
        lines = [json.dumps({"event": "start", "node": "n"}), *map(json.dumps, events)]
        (tmp_path / given.key / f"{given.job}_events.jsonl").write_text("\n".join(lines) + "\n")
        states[given.job] = ("FAILED", "n", "")
        return made.wait(0.1) or made.wait(0.1)  # what is to be submitted again is, by the second

    assert not made.wait(0.1)
    assert not ends({"event": "stopped", "by": "SIGKILL"}, {"event": "terminated"}) and given.job == "8"
    assert any("raise executor.signal_seconds" in line for line in given.work.news)
    assert "job 7 ended (PREEMPTED): submitted again" in given.work.news
    states["8"] = ("FAILED", "n", "")  # before it began
    (work,) = made.wait(0.1) or made.wait(0.1)
    assert work.failures[run][0].error == "its job 8 ended without a result: FAILED"


def given(made, path, *settings):
    """Give the executor one training, and return what it keeps of it."""
    made.submit(StageQueue([Stage("train", Call("train", settings=settings), (path,))], path.parent), Slot("Slurm", {}))
    return made._given[-1]


def test_a_later_array_has_no_more_jobs_than_may_run(tmp_path, monkeypatch):
    """Without a cluster. An array's own bound stays as it was when it was submitted."""
    arrays, numbers = [], iter(map(str, range(100)))
    made = SlurmExecutor(SlurmSettings(jobs_at_once=3, poll_seconds=0), tmp_path)
    monkeypatch.setattr(slurm_executor, "queue_states", dict)
    monkeypatch.setattr(made, "_has_ended", lambda one, states: one.job in ended)

    def array(calls, folder, key, at_once):
        arrays.append((len(calls), at_once))
        return [next(numbers) for _ in calls]

    monkeypatch.setattr(made, "_array", array)
    ended = set()
    for name in "abcde":
        given(made, tmp_path / name)
    made.wait(0)
    assert arrays == [(5, 3)] and made.free_slot() is None
    ended = {"0", "1", "2"}
    assert len(made.wait(0)) == 3
    for name in "fghi":
        given(made, tmp_path / name)
    made.wait(0)
    assert arrays == [(5, 3), (1, 1)]
    ended = {"3"}
    made.wait(0)
    made.wait(0)
    assert arrays == [(5, 3), (1, 1), (1, 1)]


def test_nothing_is_submitted_to_a_controller_that_is_silent(tmp_path, monkeypatch):
    made = SlurmExecutor(SlurmSettings(jobs_at_once=3, poll_seconds=0), tmp_path)
    monkeypatch.setattr(slurm_executor, "queue_states", lambda: None)
    monkeypatch.setattr(made, "_array", lambda *_: pytest.fail("it was submitted"))
    one = given(made, tmp_path / "run")
    assert made.wait(0) == made.wait(0) == []
    assert one.work.news == ["Slurm's controller does not answer: waiting for it"]
    monkeypatch.setattr(slurm_executor, "queue_states", dict)
    monkeypatch.setattr(made, "_array", lambda *_: ["7"])
    made.wait(0)
    assert one.job == "7"


def test_of_an_array_that_was_half_written_down_only_the_unknown_jobs_are_cancelled(tmp_path, monkeypatch):
    cancelled = []
    monkeypatch.setattr(slurm_executor, "_listed", lambda command: ["7_0", "7_1", "7_2"])
    monkeypatch.setattr(slurm_executor, "_cancel", lambda job: not cancelled.append(job))
    for name, key, job in (("a", "k", "7_0"), ("b", "k", None), ("c", "k", None), ("d", "other", "7_2")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"key": key, "job": job}))
    made = SlurmExecutor(SlurmSettings(), tmp_path)
    assert made.find(tmp_path / "runs" / "b") is None and cancelled == ["7_1", "7_2"]
    assert not (tmp_path / "b.json").exists() and (tmp_path / "a.json").exists()


def test_a_job_that_is_submitted_again_knows_which_stages_have_failed(tmp_path, monkeypatch):
    made, run = SlurmExecutor(SlurmSettings(poll_seconds=0), tmp_path), tmp_path / "run"
    one = given(made, run)
    one.key, one.job = "k", "7"
    left = StageQueue([Stage("score b", Call("score"), (run,), "b")], tmp_path, seconds=5.0)
    left.fail(Stage("score a", Call("score"), (run,), "a"), 1, tmp_path / "log")
    monkeypatch.setattr(made, "_submitted", lambda key, job: StageJob(left, one.slot, tmp_path, 60.0))
    assert not made._settle(one, "TIMEOUT")
    assert one.work.waiting == left.waiting and one.work.failures == left.failures and one.work.seconds == 5.0


def test_a_job_trains_anew_once_whatever_starts_it_again(tmp_path, monkeypatch):
    """Without a cluster. The claim of the run tells whether an earlier start has removed what was there."""
    made, run = SlurmExecutor(SlurmSettings(), tmp_path), tmp_path / "run"
    claim = run / "claim.json"
    claim.parent.mkdir()
    claim.write_text("{}")
    one = given(made, run, "overwrite=true", "seed=1")
    job = made._job_call(one, tmp_path)

    def settings():
        return job._once(job.work.waiting[0]).call.settings

    assert settings() == ("overwrite=true", "seed=1")  # nor has it begun where it ended before its training did
    os.utime(claim, ns=(1, 1))  # written again
    assert settings() == ("seed=1",)
    one.job = None  # and submitted again
    job = made._job_call(one, tmp_path)
    assert settings() == ("seed=1",)
    job.claims = None  # of older code
    assert settings() == ("overwrite=true", "seed=1")


def test_a_job_that_could_not_be_requeued_ends_before_it_works(tmp_path, monkeypatch):
    """As in a container without Slurm's programs."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no scontrol in the job"):
        StageJob(StageQueue([], tmp_path, []), Slot("Slurm", {}), tmp_path, 60.0)()


@pytest.mark.slow
def test_six_runs_are_one_array_on_two_slots(folder, cluster):
    """Each run once, no more at once than asked for, the files of submitit gone at the end."""
    lines, at_once = [], []

    def say(line):
        lines.append(line)
        at_once.append(len(jobs_in("RUNNING")))

    filled = fake_grid.run(fake_grid.table(folder), executor=executor(jobs_at_once=2), say=say)
    assert len(filled.done) == 6 and not filled.failed and set(trained(folder).values()) == {1}
    arrays = {
        line.split(": job ")[1].split("_")[0]
        for line in lines
        if line.startswith("training: ") and "_" in line.split(": job ")[-1]
    }
    assert len(arrays) == 1 and any(" started on " in line for line in lines)
    told = [found for line in lines if (found := re.search(r"(\d+) running, (\d+) queued", line))]
    counts = [(int(found[1]), int(found[2])) for found in told]
    assert any(running and queued for running, queued in counts), lines
    assert all(running + queued <= 6 for running, queued in counts), lines
    assert 1 <= max(at_once) <= 2  # by Slurm: the grid takes a job for running until its result is read
    assert not list((grid.GRID_PATH / "slurm").glob("*.json")) and not list((grid.GRID_PATH / "slurm").glob("*/*.pkl"))
    assert not fake_grid.run(fake_grid.table(folder), executor=executor()).failed  # nothing is left: no job
    assert set(trained(folder).values()) == {1}


@pytest.mark.slow
def test_a_killed_grid_finds_its_jobs_again_and_two_grids_share_them(folder, cluster):
    """kill -9 while jobs run and wait; then the same command twice at once."""
    table = fake_grid.table(folder)
    first = names_of(table)[0]
    hold(folder, first)
    pid = fake_grid.fork(table, executor=executor())
    cluster.until(lambda: begun(table, first))
    cluster.until(lambda: trained(folder))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    lines = []
    other = fake_grid.fork(table, executor=executor())
    (folder / f"saved-{first}").write_text("")  # the next start of the held stage is quick
    record = json.loads((grid.GRID_PATH / "slurm" / f"{first}.json").read_text())
    # Slurm 22.05 may answer that the job is done (status 229) and send the signal all the same; what follows shows it.
    cluster.run("scancel", "--signal=USR1", record["job"])
    filled = fake_grid.run(table, executor=executor(), say=lines.append)
    assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == 0
    assert not filled.failed, lines
    assert len(filled.done) == 6
    assert set(trained(folder).values()) == {1} and len(trained(folder)) == 6
    assert not jobs_in("RUNNING", "PENDING")


@pytest.mark.slow
def test_a_time_limit_and_a_requeue_are_ordinary_and_scancel_is_a_failure(folder, cluster):
    """The time limit is Slurm's own: it sends USR1, the training saves, the job goes back into the queue, and on."""
    table = fake_grid.table(folder, seeds=[1, 2])
    limited, requeued, cancelled, preempted = names_of(table)
    hold(folder, limited, requeued, cancelled, preempted)
    pid = fake_grid.fork(
        table, executor=executor(time_minutes=1, signal_seconds=50), say=lambda line: _note(folder, line)
    )

    def job_of(run):
        return json.loads((grid.GRID_PATH / "slurm" / f"{run}.json").read_text())["job"]

    cluster.until(lambda: begun(table, requeued))
    (folder / f"saved-{requeued}").write_text("")  # its next start is quick
    cluster.ask("scontrol", "requeue", job_of(requeued))
    cluster.until(lambda: begun(table, cancelled))
    cluster.ask("scancel", job_of(cancelled))
    cluster.until(lambda: begun(table, preempted))
    (folder / f"saved-{preempted}").write_text("")
    cluster.run("scancel", "--signal=TERM", job_of(preempted))  # as the preempted get it in their grace time
    cluster.until(lambda: {limited, requeued, preempted} <= set(trained(folder)))
    assert (folder / f"saved-{limited}").exists()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    lines = (folder / "said").read_text().splitlines()
    assert set(trained(folder)) == {limited, requeued, preempted} and set(trained(folder).values()) == {1}
    assert any(line.startswith(f"failed: {cancelled}: train: its job") and "CANCELLED" in line for line in lines)
    assert any("ended (PREEMPTED): submitted again" in line for line in lines)
    assert not any("node failures" in line for line in lines)
    (folder / "hold").unlink()
    assert not fake_grid.run(table, executor=executor(), retry=True).failed


@pytest.mark.slow
def test_a_node_that_fails_is_counted_and_is_no_error(folder, cluster):
    table = fake_grid.table(folder, seeds=[1])
    first, second = names_of(table)
    hold(folder, first, second)
    pid = fake_grid.fork(table, executor=executor(), say=lambda line: _note(folder, line))
    cluster.until(lambda: len(list((folder / "pids").glob("*") if (folder / "pids").exists() else [])) == 2)
    cluster.kill_node()
    (folder / "hold").unlink()
    cluster.until(lambda: "down" in cluster.ask("sinfo", "-h", "-o", "%T"))
    cluster.start_node()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    said = (folder / "said").read_text()
    assert "its node had failed" in said and "2 node failures" in said and "failed: " not in said
    assert trained(folder) == {first: 1, second: 1}


@pytest.mark.slow
@pytest.mark.parametrize("cancel", [False, True])
def test_ctrl_c_cancels_the_jobs_only_when_told(folder, cluster, cancel):
    table = fake_grid.table(folder, seeds=[1])
    hold(folder, *names_of(table))
    pid = fake_grid.fork(table, executor=executor(), cancel=cancel, say=lambda line: _note(folder, line))
    cluster.until(lambda: len(list((folder / "pids").glob("*") if (folder / "pids").exists() else [])) == 2)
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    told = (folder / "said").read_text().splitlines()[-1]
    (folder / "hold").unlink()
    if cancel:
        assert told.startswith("2 jobs are cancelled")
        cluster.until(lambda: not jobs_in("RUNNING", "PENDING", "COMPLETING"))
    else:
        assert told.startswith("2 jobs go on in Slurm") and len(jobs_in("RUNNING")) == 2
        for job in jobs_in("RUNNING"):
            cluster.ask("scancel", "--signal=USR1", job)
    assert not fake_grid.run(table, executor=executor()).failed
    assert set(trained(folder).values()) == {1}


def _note(folder, line):
    with open(folder / "said", "a", encoding="utf-8") as file:
        file.write(line + "\n")


@pytest.fixture
def base(tiny_model, tmp_path):
    """A BA-LoRA run of 80 steps, with a checkpoint after each tenth."""
    trainer = {"per_device_train_batch_size": 2, "max_steps": 80, "save_steps": 10, "learning_rate": 0.01}
    base = {
        "model": {"name": str(tiny_model), "dtype": "float32"},
        "adapter": {"rank": 4, "dropout": 0.1},
        "data": {"name": "toy", "num_rows": 40, "max_length": 400},
        "trainer": trainer | {"logging_steps": 1, "disable_tqdm": True, "use_cpu": True},
        "eval": {"tasks": [], "untuned": False},
        "export": {"merged": False},
        "results_dir": str(tmp_path / "results"),
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    return tmp_path / "base.yaml"


def losses(run):
    entries = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


def check_same_weights(*runs):
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_a_real_training_that_is_told_to_stop_ends_as_without_it(cluster, base, tmp_path, root):
    """scripts/slurm/submit.sh, two processes: USR1 in the middle, saved, requeued, resumed; the very same weights. Told
    to train anew, it does so once."""
    environment = os.environ | {"NUM_PROCESSES": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    environment |= {"ACCELERATE_CONFIG": "configs/accelerate/cpu.yaml", "GPUS_PER_NODE": "0"}

    def call(script, name):
        words = ["sh", f"scripts/{script}", str(base), f"output_dir={tmp_path / name}", "overwrite=true"]
        done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    job = call("slurm/submit.sh", "stopped").split()[-1]
    log = root / "outputs" / "slurm" / f"{job}.log"
    try:
        cluster.until((tmp_path / "stopped" / "checkpoints" / "checkpoint-10" / "files.json").is_file, seconds=600)
        cluster.ask("scancel", "--batch", "--signal=USR1", job)
        cluster.until((tmp_path / "stopped" / "train.json").is_file, seconds=600)
        assert json.loads((tmp_path / "stopped" / "train.json").read_text())["status"] == "ok"
        cluster.until(lambda: not jobs_in("RUNNING", "PENDING", "COMPLETING"))
        text = log.read_text()
    finally:
        log.unlink(missing_ok=True)
    steps = [int(step) for step in re.findall(r"told to stop \(USR1\): saved at step (\d+) of 80", text)]
    assert len(steps) == 1 and f"resumed from step {steps[0]} of 80" in text
    call("ba-lora.sh", "whole")
    check_same_weights(tmp_path / "stopped", tmp_path / "whole")


STANDS_IN = """\
echo start >>starts
case "$1 ${SLURM_RESTART_COUNT:-0} $SLURM_PROCID" in
fails*0) until [ "$(wc -l <starts)" -ge 2 ]; do sleep 0.1; done; exit 1 ;;
ends*1?0 | ends*1?1) exit 0 ;;
esac
exec sleep 600
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("happens", "state", "restarts"), [("fails", "FAILED", 0), ("ends", "COMPLETED", 1), ("cancelled", "CANCELLED", 0)]
)
def test_a_run_goes_back_into_the_queue_when_it_is_preempted_and_not_when_it_fails(
    cluster, tmp_path, root, happens, state, restarts
):
    """scripts/slurm/train.sbatch of two processes. Where one fails, srun ends the other by SIGTERM, which is also what
    the preempted get."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "ba-lora.sh").write_text(STANDS_IN)
    words = ["--parsable", "--ntasks-per-node=2", f"--chdir={tmp_path}", "--output=log"]
    job = cluster.ask("sbatch", *words, str(root / "scripts" / "slurm" / "train.sbatch"), happens).strip()

    def known(name):
        return re.search(rf"{name}=(\w+)", cluster.ask("scontrol", "show", "job", job))[1]

    starts = tmp_path / "starts"
    cluster.until(lambda: starts.is_file() and len(starts.read_text().splitlines()) >= 2)
    if happens == "ends":
        cluster.run("scancel", "--signal=TERM", job)
    if happens == "cancelled":
        cluster.ask("scancel", job)
    cluster.until(lambda: known("JobState") in ("FAILED", "COMPLETED", "CANCELLED"))
    assert (known("JobState"), int(known("Restarts"))) == (state, restarts), (tmp_path / "log").read_text()
    assert len(starts.read_text().splitlines()) == 2 * (1 + restarts)
    assert not list((tmp_path / "outputs" / "slurm").glob("*.failed")) or happens == "cancelled"


def trainings(config):
    """Return the processes that train by a config's file."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if {"train_nlg.py", str(config)} <= set(process.cmdline()):
                found.append(process.pid)
    return found


def give(made, base, run):
    spec = Spec.resolve(str(base), "ba_lora", [f"output_dir={run}", "trainer.max_steps=200"])
    made.submit(StageQueue([training_stage(spec, [sys.executable])], run.parent, []), made.free_slot())


def end_of(made, cluster, *, seconds=900):
    """Return the work once it has ended well."""
    deadline = time.monotonic() + seconds
    while not (works := made.wait(0.2)):
        assert time.monotonic() < deadline, cluster.state()
    (work,) = works
    assert not work.failures and not work.waiting, work.log_path.read_text()[-3000:]
    return work


def reach_the_time_limit(cluster, base, job, log, noted, *, began):
    """Hold the training still, with its time limit so near that Slurm sends USR1; the next start has time enough, on a
    busy machine, too."""
    pids = trainings(base)  # not earlier: while the shell before it becomes the training, neither is seen
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    minutes = int(time.monotonic() - began) // 60 + 2
    cluster.ask("scontrol", "update", f"jobid={job}", f"timelimit={minutes}")
    cluster.until(lambda: "Caught signal SIGUSR1" in log.read_text())
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # Slurm lets it go on, too
            os.kill(pid, signal.SIGCONT)
    cluster.until(lambda: "stopped" in noted.read_text())
    cluster.until(lambda: cluster.run("scontrol", "update", f"jobid={job}", "timelimit=60").returncode == 0)


def be_requeued(cluster, base, job, log, noted, *, began):
    """Without a word before, as by preemption without grace."""
    cluster.ask("scontrol", "requeue", job)
    cluster.until(lambda: noted.read_text().count('"start"') == 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("happens", "kinds"),
    [
        (reach_the_time_limit, ["start", "stage", "stopped", "start", "stage"]),
        (be_requeued, ["start", "stage", "start", "stage"]),
    ],
)
def test_a_real_training_that_is_interrupted_ends_as_on_this_machine(cluster, base, tmp_path, happens, kinds):
    """Given by the executor, and interrupted after its first checkpoint."""
    settings = SETTINGS | {"time_minutes": 60, "signal_seconds": 60, "setup": ("export OMP_NUM_THREADS=1",)}
    on_slurm = SlurmExecutor.open(SlurmSettings(**settings), folder=tmp_path, gpus=1, workers=None)
    give(on_slurm, base, tmp_path / "interrupted")
    began = time.monotonic()
    assert not on_slurm.wait(0.0)  # submits it
    job = json.loads((tmp_path / "slurm" / "interrupted.json").read_text())["job"]
    checkpoint = tmp_path / "interrupted" / "checkpoints" / "checkpoint-10" / "files.json"
    cluster.until(checkpoint.is_file, seconds=900, every_s=0.01)
    (log,), (noted,) = ((tmp_path / "slurm").glob(f"*/*_{end}") for end in ("log.out", "events.jsonl"))
    happens(cluster, base, job, log, noted, began=began)
    work = end_of(on_slurm, cluster)
    assert on_slurm.node_failures == 0
    events = [json.loads(line) for line in noted.read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] != "terminated"] == kinds  # as Slurm takes it back
    text = work.log_path.read_text()
    (step,) = re.findall(r"resumed from step (\d+) of 200", text)
    if happens is reach_the_time_limit:
        assert events[2]["by"] == "SIGUSR1" and f"told to stop (USR1): saved at step {step} of 200" in text

    here = LocalExecutor([Slot("here", {"OMP_NUM_THREADS": "1"})])
    give(here, base, tmp_path / "whole")
    end_of(here, cluster)
    assert losses(tmp_path / "interrupted") == losses(tmp_path / "whole")
    check_same_weights(tmp_path / "interrupted", tmp_path / "whole")
