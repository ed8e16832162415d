"""Workers: whose GPU it is, and that a stage leaves nothing behind that would keep its locks."""

import os
import shutil
import subprocess
import sys

import pytest

from ba_lora.errors import UserError
from ba_lora.experiments.executors import local as executor
from ba_lora.experiments.executors import open_executor
from ba_lora.experiments.executors.base import Slot, StageQueue, log_lines
from ba_lora.experiments.executors.local import LocalExecutor, local_slots
from ba_lora.experiments.stages import Call, Stage, launch_command
from ba_lora.locks import holder, try_lock
from tests.support.pages import example


def gpu_slots(folder, gpus, per_run=1):
    return local_slots(folder, gpus_per_run=per_run, environ={"CUDA_VISIBLE_DEVICES": gpus})


def test_slots(tmp_path):
    slots = gpu_slots(tmp_path, "0,1,2,3")
    assert [slot.environment for slot in slots] == [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in "0123"]
    (slot,) = gpu_slots(tmp_path, "4,5,6", per_run=2)
    assert slot.environment == {"CUDA_VISIBLE_DEVICES": "4,5"} and slot.num_gpus == 2
    assert len(local_slots(tmp_path, workers=3, environ={"CUDA_VISIBLE_DEVICES": ""})) == 3


@pytest.mark.parametrize("gpus", ["0,1", ""])
def test_more_gpus_than_there_are_are_refused(tmp_path, gpus):
    with pytest.raises(UserError, match=f"gpus=8: only {len(gpus.split(',')) if gpus else 0} GPU"):
        gpu_slots(tmp_path, gpus, per_run=8)


def test_two_grids_do_not_share_a_gpu(tmp_path):
    slots = gpu_slots(tmp_path, "0,1")
    first, second = LocalExecutor(slots), LocalExecutor(slots)
    held = first.free_slot()
    assert held.name == "GPU 0" and second.free_slot().name == "GPU 1"
    second.wait(0)
    assert first.free_slot().name == "GPU 0"


def test_grids_with_other_groups_do_not_share_a_gpu(tmp_path):
    """All GPUs of a group are taken, or none of them."""
    single, pair = (LocalExecutor(gpu_slots(tmp_path, gpus, n)) for gpus, n in (("1", 1), ("0,1", 2)))
    assert single.free_slot().name == "GPU 1" and pair.free_slot() is None
    (busy,) = pair.busy_elsewhere()
    (lock_path,) = single.slots[0].lock_paths
    assert busy == f"GPU 0,1: {holder(lock_path)}"
    assert LocalExecutor(gpu_slots(tmp_path, "0")).free_slot().name == "GPU 0"
    single.wait(0)
    assert pair.free_slot().name == "GPU 0,1" and pair.busy_elsewhere() == []
    assert single.free_slot() is None


def test_two_jobs_of_a_machine_that_both_have_a_gpu_0_do_not_wait_for_each_other(tmp_path, monkeypatch):
    """As under Slurm, which shows each job only its own GPUs, numbered from 0, by nvidia-smi as well."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    grids = []
    for uuids, visible in (("GPU-1b", "0"), ("GPU-2c", "0"), ("GPU-1b GPU-2c", "0,1")):
        program.write_text(f"#!/bin/sh\nprintf '%s\\n' {uuids}\n")
        program.chmod(0o755)
        grids.append(LocalExecutor(gpu_slots(tmp_path, visible)))
    first, second, third = grids
    assert first.free_slot() and second.free_slot() and third.free_slot() is None
    first.wait(0)
    assert third.free_slot().name == "GPU 0"


def test_no_two_groups_are_given_one_port(tmp_path):
    """Any free one is taken, whatever groups other grids made."""
    (slot,) = gpu_slots(tmp_path, "2,3", per_run=2)
    command = launch_command(slot.environment, num_gpus=slot.num_gpus)
    assert command[command.index("--main_process_port") + 1] == "0"


def run_stage(program, folder, locks=(), name="generate"):
    work = StageQueue(
        [Stage(name, Call("-c", settings=(program,), launch=(sys.executable,)), (folder,))], folder, list(locks)
    )
    local = LocalExecutor([Slot("worker", {})])
    local.submit(work, local.free_slot())
    assert local.wait(60) == [work]
    work.release()
    return work


def test_a_stage_of_the_harness_has_a_log_of_its_own(tmp_path):
    (tmp_path / "run").mkdir()
    work = run_stage("print('scored')", tmp_path / "run", name="harness/bbq")
    assert not work.failures and work.log_path.name == "run.harness-bbq.log"
    assert work.log_path.read_text() == "scored\n"


@pytest.mark.parametrize("then", ["os.kill(os.getpid(), 9)", "sys.exit(0)"])
def test_a_child_that_a_stage_left_behind_is_gone_with_its_locks(tmp_path, monkeypatch, then):
    """An engine's worker process, say, after the OOM killer has ended the stage itself. Its memory takes a while to go,
    and the next stage needs it."""
    monkeypatch.setattr(executor, "CHILDREN_GRACE_S", 0.0)
    path = tmp_path / ".run.lock"
    child = "held = bytearray(b'x') * 2**28; os.write(w, b'x'); time.sleep(600)"
    program = f"import os, sys, time; r, w = os.pipe()\nif os.fork() == 0: {child}\nos.read(r, 1); {then}"
    run_stage(program, tmp_path, [try_lock(path)])
    lock = try_lock(path)
    assert lock is not None, "the child lives on"
    lock.close()


def test_what_a_crashed_stage_left_behind_may_clean_up(tmp_path, monkeypatch):
    """As multiprocessing's resource tracker, which unlinks the shared memory once all others have closed its pipe."""
    monkeypatch.setattr(executor, "CHILDREN_GRACE_S", 60.0)
    tracker = f"os.close(w); os.read(r, 1); time.sleep(0.5); open({str(tmp_path / 'unlinked')!r}, 'w')"
    program = f"import os, time; r, w = os.pipe()\nif os.fork() == 0: {tracker}\nelse: os.kill(os.getpid(), 9)"
    run_stage(program, tmp_path)
    assert (tmp_path / "unlinked").is_file()


def test_a_zombie_that_nobody_reaps_is_waited_for_no_longer():
    """As in a container whose first process reaps nothing."""
    zombie = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    os.killpg(zombie.pid, 0)  # the group is still there
    assert not executor.group_lives(zombie.pid)
    zombie.wait()


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("step 1\r\n\n  \rstep 2\r", ["step 1", "step 2"]),
        (" 10%|# |\r 50%|##|\n\x1b[A", ["10%|# |", "50%|##|"]),
    ],
)
def test_lines_of_a_log(tmp_path, text, lines):
    assert log_lines(tmp_path / "log") == []
    (tmp_path / "log").write_bytes(text.encode())
    assert log_lines(tmp_path / "log") == lines


def test_the_example_of_an_executor_works(tmp_path, root):
    """As docs/adding.md tells, in a copy of the tree: one file and one config, and the grid knows it."""
    for name in ("ba_lora", "configs", "data", "eval"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "toy"))
    shutil.copytree(root / "tests" / "workers", tmp_path / "tests" / "workers")
    (tmp_path / "tests" / "__init__.py").touch()
    for title in ("ba_lora/experiments/executors/polite.py", "configs/executors/polite.yaml"):
        (tmp_path / title).write_text(example("docs/adding.md", title))
    program = """
from pathlib import Path
from ba_lora.experiments import grid
from ba_lora.experiments.executors import open_executor
from tests.workers import fake_grid
there = Path("there").absolute()
fake_grid.use(there)
polite = open_executor("polite", {"niceness": 5}, folder=grid.GRID_PATH, gpus=1)
filled = fake_grid.run(fake_grid.table(there), executor=polite, say=print)
assert len(filled.done) == 6 and polite.niceness == 5
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "on this machine" in done.stdout and "6 of 6 done" in done.stdout


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        ("slrum", {}, "executor=slrum: no such file: .*nearest: slurm"),
        ("slurm", {"partitoin": "gpu"}, "unknown key partitoin .nearest: partition"),
        ("slurm", {"jobs_at_once": 0}, "jobs_at_once=0: a whole number of at least 1"),
        ("slurm", {"signal_seconds": 20}, "signal_seconds=20: more than 20 and less than 86400"),
        ("slurm", {"signal_seconds": 60, "time_minutes": 1}, "signal_seconds=60: more than 20 and less than 60"),
        ("slurm", {"jobs_at_once": 200}, "200 jobs at once, but jobs_queued=100"),
        ("slurm", {"sbatch": {"job-name": "mine"}}, "sbatch: job_name is set by the executor itself"),
        ("slurm", {"gpus": 4}, r"gpus=4: the table's rows are set for 1 GPU\(s\) a run"),
        ("slurm", {"modules": "cuda"}, "slurm.yaml: modules: cuda: a list, each a word, is needed"),
        ("slurm", {"cpus": "many"}, "slurm.yaml: cpus: many: a whole number is needed"),
        ("local", {"partition": "gpu"}, "unknown key partition"),
    ],
)
def test_settings_that_an_executor_cannot_use_are_refused(tmp_path, name, typed, message):
    with pytest.raises(UserError, match=message):
        open_executor(name, typed, folder=tmp_path, gpus=1)


def test_only_files_with_an_executor_are_named(tmp_path):
    (tmp_path / "x.yaml").write_text("executor: warmed\n")
    with pytest.raises(UserError, match="executor: warmed is unknown.*; there are .*local.*slurm.*warm"):
        open_executor(str(tmp_path / "x.yaml"), {}, folder=tmp_path, gpus=1)


def test_without_slurm_its_executor_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no srun here"):
        open_executor("slurm", {}, folder=tmp_path, gpus=1)
