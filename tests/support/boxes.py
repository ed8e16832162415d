"""What the sandbox's tests share."""

import functools
import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest

from eval.sandbox import launcher
from eval.sandbox.jobs import Limits

QUICK = Limits(cpu_s=1, wall_s=4, memory_bytes=256 * 2**20, processes=16)
TESTS = "assert f(1) == 2"
RIGHT = "def f(x): return x + 1"
MARK = f"mark-{secrets.token_hex(8)}"


@functools.cache
def missing() -> str:
    """Return what keeps bubblewrap from working on this machine; our own code is not asked."""
    if shutil.which("bwrap") is None:
        return f"no bubblewrap: {launcher.INSTALL}"
    command = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    tried = subprocess.run(command, capture_output=True, text=True)
    return f"no namespaces: {tried.stderr.strip()}" if tried.returncode else ""


needs_bubblewrap = pytest.mark.skipif(bool(missing()), reason=missing())


def open_to_all(folder: Path) -> None:
    """Let every user read a test's own folder, which pytest makes for one user only."""
    for path in [folder, *folder.parents]:
        if path == Path(tempfile.gettempdir()):
            return
        path.chmod(0o755)


def processes_of_boxes() -> list[str]:
    """Return the command lines of this test's processes that run in a box."""
    ours = {os.geteuid()}
    if 0 in ours:
        ours = {launcher.FIRST_UID + (os.getpid() * 16 + slot) % launcher.NUM_UIDS for slot in range(16)}
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            user = path.stat().st_uid
        except OSError:
            continue
        if MARK in text or ("_main()" in text and user in ours and not _of_another_worker(int(path.parent.name))):
            found.append(text)
    return found


def _of_another_worker(pid: int) -> bool:
    """Whether a process descends from another of pytest-xdist's workers, which have one parent."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return False
    try:
        parents = psutil.Process(pid).parents()
    except psutil.NoSuchProcess:
        return False
    return any(parent.pid != os.getpid() and parent.ppid() == os.getppid() for parent in parents)
