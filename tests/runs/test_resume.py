"""kill -9 at any moment, then the same command: the uninterrupted run's weights, bit for bit."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ba_lora.errors import UserError
from ba_lora.training import trainer
from ba_lora.training.checkpoints import MANIFEST, checkpoint_fault, checkpoint_folders, find_checkpoint
from tests.support.tiny import only_result

# Inside a checkpoint's adapter, its optimizer and random state, the list of its files; inside adapter/, lora/, merged/;
# inside the log, train.json and the result. (save_file serialises through serialize_file; every atomic write renames.)
POINTS = [
    "safetensors.torch.serialize_file:1",
    "safetensors.torch.serialize_file:2",
    "safetensors.torch.serialize_file:4",
    "safetensors.torch.serialize_file:6",
    "safetensors.torch.serialize_file:7",
    "safetensors.torch.serialize_file:8",
    "torch.save:3",
    "torch.save:5",
    "os.replace:1",
    "os.replace:4",
    "os.replace:8",
]


def write_config(folder, tiny_model, *, dtype, sampling):
    path = folder / "kill.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": {"name": str(tiny_model), "dtype": dtype},
                "adapter": {"rank": 4, "dropout": 0.1},
                "data": {"name": "toy", "num_rows": 40, "max_length": 400},
                "trainer": {  # 5 steps an epoch, 8 in all: resuming crosses an epoch, and ends inside one
                    "per_device_train_batch_size": 4,
                    "gradient_accumulation_steps": 2,
                    "learning_rate": 0.01,
                    "max_steps": 8,
                    "train_sampling_strategy": sampling,
                    "logging_steps": 1,
                    "save_steps": 2,
                    "disable_tqdm": True,
                    "use_cpu": True,
                },
            }
        )
    )
    return path


def killed(config, folder, num_random, points, root):
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    worker = str(root / "tests" / "workers" / "killed_runs.py")
    command = [sys.executable, worker, str(config), str(folder), str(num_random), *points]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(report, num_points):
    whole = report["whole"]
    assert whole["status"] == "ok" and whole["steps"] == list(range(1, 9)) and not whole["leftovers"]
    for attempt in report["attempts"]:
        for key in ("files", "status", "scores", "steps", "leftovers"):
            assert attempt[key] == whole[key], attempt["point"]
    armed = report["attempts"][:num_points]
    assert [attempt["signal"] for attempt in armed] == [signal.SIGKILL] * num_points, armed


@pytest.mark.slow
def test_resume_after_kill(tmp_path, tiny_model, root):
    """On a bf16 base, whose residual must be rebuilt to the bit, with rows grouped by length, across an epoch."""
    config = write_config(tmp_path, tiny_model, dtype="bfloat16", sampling="group_by_length")
    report = killed(config, tmp_path / "runs", 2, POINTS[1::5], root)
    check(report, len(POINTS[1::5]))
    assert any(attempt["warned"] for attempt in report["attempts"])  # a half-written checkpoint was told of


@pytest.mark.slow
def test_resume_after_kill_at_20_instants(tmp_path, tiny_model, root):
    config = write_config(tmp_path, tiny_model, dtype="float32", sampling="random")
    check(killed(config, tmp_path / "runs", 9, POINTS, root), len(POINTS))


# ---- what counts as a whole checkpoint


@pytest.fixture
def checkpoints(train):
    folder = train("trainer.max_steps=4", "trainer.save_steps=2") / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert find_checkpoint(folder).name == "checkpoint-4"
    return folder


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "adapter_model.safetensors", MANIFEST]
)
def test_a_missing_file_falls_back_to_the_checkpoint_before(checkpoints, name):
    (checkpoints / "checkpoint-4" / name).unlink()
    assert find_checkpoint(checkpoints).name == "checkpoint-2"


def test_a_truncated_or_changed_file_falls_back(checkpoints):
    file = checkpoints / "checkpoint-4" / "optimizer.pt"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    assert "bytes instead of" in checkpoint_fault(checkpoints / "checkpoint-4")
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert "other contents" in checkpoint_fault(checkpoints / "checkpoint-4")
    assert find_checkpoint(checkpoints).name == "checkpoint-2"
    (checkpoints / "checkpoint-2" / MANIFEST).write_text("{")
    assert find_checkpoint(checkpoints) is None


def test_an_empty_list_of_files_is_no_whole_checkpoint(checkpoints):
    (checkpoints / "checkpoint-4" / MANIFEST).write_text("{}")
    assert "lists no files" in checkpoint_fault(checkpoints / "checkpoint-4")


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": 1}', '{"a": {}}', '{"a": {"bytes": 1}}', "\x00"])
def test_a_damaged_list_of_files_is_no_whole_checkpoint(tmp_path, text):
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / MANIFEST).write_text(text)
    assert MANIFEST in checkpoint_fault(folder) and find_checkpoint(tmp_path) is None


def test_damaged_newer_checkpoints_do_not_push_out_the_good_one(train):
    """Trainer's rotation would take them for the newest and delete what is being written."""
    run = train("trainer.max_steps=8", "trainer.save_steps=2")
    folder = run / "checkpoints"
    (folder / "checkpoint-8" / "optimizer.pt").unlink()
    (run / "train.json").unlink()
    train("trainer.max_steps=8", "trainer.save_steps=2")
    assert find_checkpoint(folder).name == "checkpoint-8" and (run / "merged").is_dir()


def test_a_users_copies_of_checkpoints_neither_break_nor_end_a_resumed_run(train, capsys):
    """A copy under another step's name is no checkpoint of that step; copies of other names are left alone."""
    run = train("trainer.max_steps=4", "trainer.save_steps=2", name="whole")
    weights = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    folder = run / "checkpoints"
    shutil.copytree(folder / "checkpoint-4", folder / "checkpoint-final")
    shutil.rmtree(folder / "checkpoint-4")
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-99")
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-4")
    assert "it is of step 2" in checkpoint_fault(folder / "checkpoint-99")
    (run / "train.json").unlink()
    capsys.readouterr()
    train("trainer.max_steps=4", "trainer.save_steps=2", name="whole")
    assert "resumed from step 2 of 4" in capsys.readouterr().out
    assert json.loads((run / "train.json").read_text())["training"]["steps"] == 4
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == weights
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "checkpoint-2", "checkpoint-4", "checkpoint-final", "copy-of-checkpoint-4", "copy-of-checkpoint-99"
    }  # fmt: skip


def test_an_old_checkpoint_that_stays_costs_no_new_one(train, tmp_path, monkeypatch, capsys):
    """As one on NFS that somebody has open."""

    def refuse(*_, **__):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(trainer, "rotate_checkpoints", refuse)
    run = train("trainer.save_steps=1")
    assert "warning: an old checkpoint cannot be removed: [Errno 39] Directory not empty" in capsys.readouterr().err
    assert only_result(tmp_path / "results")["status"] == "ok"
    checkpoints = checkpoint_folders(run / "checkpoints")
    assert len(checkpoints) > 2 and not any(map(checkpoint_fault, checkpoints))


def test_a_full_disk_in_a_checkpoint_is_one_line_and_leaves_no_half_of_it(train, tmp_path, monkeypatch):
    """torch tells of it in words of its own, and not at the write that failed."""
    import torch

    def full(_object, path, *_args, **_kwargs):
        if str(path).endswith("optimizer.pt"):
            Path(path).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 20416 vs 20308")
        return real(_object, path, *_args, **_kwargs)

    real = torch.save
    with monkeypatch.context() as patch, pytest.raises(UserError, match="no disk space left while writing") as caught:
        patch.setattr(torch, "save", full)
        train()
    assert "checkpoint-2" in str(caught.value) and not (tmp_path / "run" / "checkpoints" / "checkpoint-2").exists()
    assert only_result(tmp_path / "results")["status"] == "failed"
    train()
    assert only_result(tmp_path / "results")["status"] == "ok"
