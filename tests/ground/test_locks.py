"""Locks are held by one process, told of by name, and gone with their holder."""

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from ba_lora.config.layers import load_config
from ba_lora.errors import UserError
from ba_lora.locks import holder, locked, training_lock_path, try_lock, work_lock_path
from ba_lora.runs.folder import claimed_folder

HOLD = "import sys, time; from pathlib import Path; from ba_lora.locks import try_lock; f = try_lock(Path(sys.argv[1]))"


def start_holder(path, root, *, then="print('held', flush=True); time.sleep(60)"):
    child = subprocess.Popen(
        [sys.executable, "-c", f"{HOLD}; {then}", str(path)], cwd=root, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "held\n"
    return child


def test_one_holder_at_a_time(tmp_path):
    path = tmp_path / "deep" / ".run.lock"
    with locked(path, doing="trains run"):
        assert json.loads(path.read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
        assert try_lock(path) is None
        with pytest.raises(UserError, match=rf"another process \(pid {os.getpid()} on .*\) trains run: wait"):
            with locked(path, doing="trains run"):
                pass
    with locked(path, doing="trains run"):  # free again, although the file is still there
        pass


def test_kill_frees_the_lock(tmp_path, root):
    path = tmp_path / ".run.lock"
    child = start_holder(path, root)
    assert try_lock(path) is None and holder(path).startswith(f"pid {child.pid} on ")
    child.send_signal(signal.SIGKILL)
    child.wait()
    with locked(path, doing="trains run"):
        pass


def test_a_child_that_inherits_the_descriptor_keeps_the_lock(tmp_path, root):
    """A stage that outlives its killed grid still holds the run."""
    path = tmp_path / ".run.lock"
    then = (
        "import subprocess; c = subprocess.Popen(['sleep', '60'], pass_fds=[f.fileno()]); "
        "print('held', flush=True); print(c.pid, flush=True); time.sleep(60)"
    )
    parent = start_holder(path, root, then=then)
    grandchild = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    try:
        assert try_lock(path) is None
        assert holder(path).endswith("which has ended: a stage that it started goes on")
    finally:
        os.kill(grandchild, signal.SIGKILL)
    for _ in range(100):
        if (file := try_lock(path)) is not None:
            file.close()
            return
        subprocess.run(["sleep", "0.05"])
    pytest.fail("the lock outlived every process that had it")


def test_a_file_system_without_locks_warns(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / ".run.lock", doing="trains run"):
        assert "has no file locks" in capsys.readouterr().err


def test_a_run_is_not_started_twice(tmp_path, root):
    config = load_config("configs/nlg/toy.yaml", overrides=[f"output_dir={tmp_path / 'run'}"])
    child = start_holder(tmp_path / ".run.lock", root)
    try:
        with pytest.raises(UserError, match=rf"another process \(pid {child.pid} on .*\) trains run"):
            claimed_folder(config).__enter__()
        assert not (tmp_path / "run").exists()
    finally:
        child.kill()
        child.wait()
    with claimed_folder(config):
        assert (tmp_path / "run").is_dir()


def test_two_links_to_one_folder_are_one_run(tmp_path, root):
    """It is locked beside the folder itself, made or still to be made."""
    (tmp_path / "one").symlink_to(tmp_path / "there" / "run")
    (tmp_path / "two").symlink_to(tmp_path / "there" / "run")
    (tmp_path / "there").mkdir()
    for lock_path in (training_lock_path, work_lock_path):
        (path,) = {lock_path(tmp_path / name) for name in ("one", "two", "there/run")}
        assert path.parent == tmp_path / "there"
    child = start_holder(training_lock_path(tmp_path / "one"), root)
    try:
        with pytest.raises(UserError, match="trains two"):
            claimed_folder(
                load_config("configs/nlg/toy.yaml", overrides=[f"output_dir={tmp_path / 'two'}"])
            ).__enter__()
    finally:
        child.kill()
        child.wait()


def test_a_lock_leaves_with_a_run_that_was_not_made(tmp_path):
    path, run = tmp_path / ".run.work.lock", tmp_path / "run"
    with locked(path, doing="works on run", made=run):
        waiting = open(path, "a+")  # another process, which has opened the file and not locked it yet
    assert not path.exists()
    fcntl.flock(waiting, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the removed file is nobody's lock any more
    with locked(path, doing="works on run", made=run):
        run.mkdir()
    assert path.exists()
    waiting.close()


def test_a_lock_whose_file_is_removed_while_it_is_taken_is_taken_again(tmp_path, monkeypatch):
    path = tmp_path / ".run.lock"
    real, taken = fcntl.flock, []

    def flock(file, how):
        real(file, how)
        taken.append(file)
        if len(taken) == 1:
            path.unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    file = try_lock(path)
    assert len(taken) == 2 and os.path.samestat(os.fstat(file.fileno()), path.stat())
    file.close()
