"""Workers: whose GPU it is, and that a stage leaves nothing behind that would keep its locks."""

import sys
import time

import pytest

from ba_lora.errors import UserError
from ba_lora.executor import LocalExecutor, Slot, Work, local_slots, log_lines
from ba_lora.locks import holder, try_lock
from ba_lora.pipeline import Stage, launch_command


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


def test_no_two_groups_are_given_one_port(tmp_path):
    """Any free one is taken, whatever groups other grids made."""
    (slot,) = gpu_slots(tmp_path, "2,3", per_run=2)
    command = launch_command(slot.environment, num_gpus=slot.num_gpus)
    assert command[command.index("--main_process_port") + 1] == "0"


@pytest.mark.parametrize("then", ["os.kill(os.getpid(), 9)", "sys.exit(0)"])
def test_a_child_that_a_stage_left_behind_frees_its_locks(tmp_path, then):
    """An engine's worker process, say, after the OOM killer has ended the stage itself."""
    path = tmp_path / ".run.lock"
    program = f"import os, sys, time; os.fork() or time.sleep(600); {then}"
    work = Work([Stage("generate", [sys.executable, "-c", program], (tmp_path,))], tmp_path, [try_lock(path)])
    executor = LocalExecutor([Slot("worker", {})])
    executor.submit(work, executor.free_slot())
    assert executor.wait(60) == [work]
    work.release()
    deadline = time.monotonic() + 10
    while (lock := try_lock(path)) is None:
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.02)
    lock.close()


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
