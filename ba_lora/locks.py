"""Locks on a run's folder: one process at a time trains it, one at a time takes it from config to table line.

A lock is `flock` on a file beside the folder (`.RUN.lock`, `.RUN.work.lock`; inside, `overwrite=true` would delete it).
The kernel frees it when its last holder dies, kill -9 included, so none is ever left behind. The file stays as long as
the run's folder does, and lies beside the folder itself, not beside a link to it. What it says of its holder is for the
reader only. On shared file systems: NFS carries these locks between machines (since Linux 2.6.12, with the server's
lock service running), a machine that goes down keeps its locks until the server's lease ends, about 90 s; Lustre and
GPFS do where they are mounted with flock. Where a file system has none, a warning says so.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil
from filelock import FileLock, Timeout

from ba_lora.errors import UserError
from ba_lora.io import disk_errors

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def training_lock_path(run_path: Path) -> Path:
    """Return the lock of whoever trains the run."""
    folder = run_path.resolve()
    return folder.with_name(f".{folder.name}.lock")


def work_lock_path(run_path: Path) -> Path:
    """Return the lock of whoever takes the run through its stages: scripts/ba-lora.sh or a grid."""
    folder = run_path.resolve()
    return folder.with_name(f".{folder.name}.work.lock")


def try_lock(path: Path) -> IO[str] | None:
    """Take the lock and return its open file (closing it frees the lock), or None while another process holds it.

    A child that inherits the file's descriptor holds the lock too, until it ends: for the stages of a grid. What no
    child inherits uses `locked`.
    """
    while True:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        except OSError as error:
            _warn_without_locks(path, error)
            return file
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # its last holder has removed it meanwhile
    with disk_errors(path):
        _write_holder(file.fileno())
    return file


def holder(path: Path) -> str:
    """Return `pid 123 on HOST`, as the lock's holder wrote it, and whether a child holds it that has outlived it."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))
        told, pid = f"pid {named['pid']} on {named['host']}", int(named["pid"])
    except (OSError, ValueError, KeyError, TypeError):  # it has just taken the lock and not written yet
        return "unknown pid"
    if named["host"] == socket.gethostname() and not psutil.pid_exists(pid):
        return f"{told}, which has ended: a stage that it started goes on"
    return told


@contextlib.contextmanager
def locked(path: Path, *, doing: str, made: Path | None = None, wait: bool = False) -> Iterator[None]:
    """Hold the lock, by filelock; at the end its file goes where `made` is given and is not there: nothing was made.

    While somebody else holds it, raises UserError, "another process (pid …) {doing}"; wait: says so once, and waits.
    """
    lock = FileLock(path, on_acquired=_write_holder)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                told = f"another process ({holder(path)}) {doing}"
                if not wait:
                    raise UserError(f"{told}: wait for it, or end it first") from None
                print(f"{told}: waiting for it", file=sys.stderr)
                lock.acquire(poll_interval=0.2)
            except OSError as error:
                _warn_without_locks(path, error)
        try:
            yield
        finally:
            if made is not None and not made.exists():
                path.unlink(missing_ok=True)
    finally:
        lock.release()


def _write_holder(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode() + b"\n", 0)


def _warn_without_locks(path: Path, error: OSError) -> None:
    if error.errno not in _NO_LOCKS:
        raise error
    print(f"warning: {path.parent} has no file locks: do not start a run there twice", file=sys.stderr)
