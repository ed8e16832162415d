"""How a box of the sandbox is started: bubblewrap's command line, Python inside, the user that it runs as."""

import contextlib
import ctypes
import errno
import functools
import os
import platform
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ba_lora.errors import UserError
from eval.sandbox.jobs import UNSAFE, Limits
from eval.sandbox.seccomp import MACHINES, seccomp_filter

KINDS = ("bubblewrap", "unsafe")
FIRST_UID, NUM_UIDS = 64_000, 1000  # the unprivileged users that boxes run as where the grader is root
ENVIRONMENT = {"PATH": "/usr/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
INSTALL = "Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap; Arch: pacman -S bubblewrap"


class Launcher:
    """Starts boxes of one kind ("bubblewrap" or "unsafe") under `limits`, between `prepare` and `close`."""

    def __init__(self, *, kind: str = "bubblewrap", limits: Limits | None = None) -> None:
        if kind not in KINDS:
            raise UserError(f"sandbox={kind} is unknown: choose one of {', '.join(KINDS)}")
        self.kind = kind
        self.limits = limits or Limits()
        self._child = Path(__file__).with_name("child.py").read_text(encoding="utf-8")
        self._prefix = Path(sys.base_prefix).resolve()
        self._executable = Path(sys._base_executable).resolve()
        self._mounts: int | None = None  # descriptor of a mount namespace in which other users reach Python
        self._users: dict[int, int] = {}  # slot → user, where the grader is root
        self._cleanup = contextlib.ExitStack()

    def describe(self) -> dict:
        """Return what a result stores: kind, version, limits (None: not enforced), and the programs' Python."""
        unlimited = {} if self.kind == "bubblewrap" else dict.fromkeys(("processes", "disk_bytes"))
        return {
            "kind": self.kind,
            "version": _version() if self.kind == "bubblewrap" else None,
            "python": platform.python_version(),
            "limits": asdict(self.limits) | unlimited,
        }

    def close(self) -> None:
        """Give back what `prepare` and the boxes took."""
        self._cleanup.close()
        self._mounts = None

    def prepare(self) -> None:
        """Find bubblewrap and a Python that a box can reach. Raises UserError where boxes cannot be made."""
        program = shutil.which("bwrap")
        if program is None:
            raise UserError(f"generated programs only run inside bubblewrap, which is missing. {INSTALL}; {UNSAFE}")
        if platform.machine() not in MACHINES:
            raise UserError(f"the sandbox knows no system calls of {platform.machine()}; {UNSAFE}")
        known = subprocess.run([program, "--help"], capture_output=True, text=True, check=False, timeout=60).stdout
        self._bwrap = [program, *(["--disable-userns"] if "--disable-userns" in known else [])]
        inside = self._executable
        self._python_binds: list[str] = []
        if not self._prefix.is_relative_to("/usr"):
            source = self._prefix
            if os.geteuid() == 0 and not _open_to_all(self._prefix):
                source = self._share_python()
            self._python_binds = ["--ro-bind", str(source), "/python"]
            inside = Path("/python") / self._executable.relative_to(self._prefix)
        self._interpreter = str(inside)

    def _share_python(self) -> Path:
        """Bind Python's folder, which lies in a closed home, to an open place, in a mount namespace of our own."""
        # any open folder will do, since nobody else sees the mount; a temporary one would outlive a killed grader
        usual = (Path(name) for name in ("/mnt", "/media", "/srv") if Path(name).is_dir())
        place = next((folder for folder in usual if _open_to_all(folder)), None)
        if place is None:
            place = Path(tempfile.mkdtemp(prefix="ba-lora-python-"))
            self._cleanup.callback(place.rmdir)
            place.chmod(0o755)
        script = 'mount --bind "$1" "$2" && echo ready && read -r _'
        holder = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(self._prefix), str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            if holder.stdout.readline() != "ready\n":
                cause = " ".join(holder.stderr.read().split())[:200]
                raise UserError(
                    f"root may not bind {self._prefix}, which other users cannot read, for the sandbox ({cause}): "
                    f"use a Python outside of root's home, or run as an ordinary user; {UNSAFE}"
                )
            self._mounts = os.open(f"/proc/{holder.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            self._cleanup.callback(os.close, self._mounts)
        finally:
            holder.communicate("\n")
        return place

    @contextlib.contextmanager
    def start(self, slot: int) -> Iterator[tuple[list[str], dict]]:
        """Give the command line and the Popen arguments of a box; `slot` tells apart boxes that run together."""
        run_child = ["-s", "-S", "-P", "-c", self._child]
        if self.kind == "unsafe":
            folder = tempfile.mkdtemp(prefix="ba-lora-unsafe-")
            yield [str(self._executable), *run_child], {"cwd": folder, "env": ENVIRONMENT | {"HOME": folder}}
            return
        information, told = os.pipe()
        filter_, filled = os.pipe()
        try:
            os.write(filled, seccomp_filter(platform.machine()))
            os.close(filled)
            command = [*self._bwrap, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
            command += ["--die-with-parent", "--new-session", "--hostname", "sandbox", "--seccomp", str(filter_)]
            command += ["--info-fd", str(told), "--ro-bind", "/usr", "/usr"]
            for name in ("lib", "lib32", "lib64", "bin", "sbin"):
                if Path("/", name).is_symlink():
                    command += ["--symlink", f"usr/{name}", f"/{name}"]
                elif Path("/", name).is_dir():
                    command += ["--ro-bind", f"/{name}", f"/{name}"]
            command += [*self._python_binds, "--proc", "/proc", "--dev", "/dev"]
            command += ["--size", str(self.limits.disk_bytes), "--perms", "0777", "--tmpfs", "/tmp"]
            command += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
            environment = ENVIRONMENT
            if self._python_binds:
                environment = ENVIRONMENT | {"LD_LIBRARY_PATH": "/python/lib"}
            arguments = {"cwd": "/", "env": environment, "pass_fds": (told, filter_), "information": information}
            if os.geteuid() == 0:
                arguments["preexec_fn"] = functools.partial(_become, self._user(slot), self._mounts, _libc())
            yield [*command, self._interpreter, *run_child], arguments
        finally:
            os.close(told)
            os.close(filter_)

    def _user(self, slot: int) -> int:
        """Return the unprivileged user of this slot, which no other box has while the sandbox is open.

        Each user has one count of processes, so boxes of two graders must not share one. An abstract socket of the
        user's name is the lock: it leaves no file, ends with its process, and is seen within the network namespace.
        """
        if slot in self._users:
            return self._users[slot]
        claim = self._cleanup.enter_context(socket.socket(socket.AF_UNIX))
        for step in range(NUM_UIDS):
            user = FIRST_UID + (os.getpid() * 16 + slot + step) % NUM_UIDS
            try:
                claim.bind(f"\0ba-lora-sandbox-{user}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            self._users[slot] = user
            self._cleanup.callback(self._users.pop, slot)
            return user
        raise UserError(
            f"{NUM_UIDS} boxes are open on this machine: wait for other graders to end, or use fewer workers"
        )


def _version() -> str | None:
    program = shutil.which("bwrap")
    if program is None:
        return None
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False, timeout=60)
    return told.stdout.strip().removeprefix("bubblewrap ")


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _become(user: int, mounts: int | None, libc: ctypes.CDLL) -> None:
    """In the child before exec, as root: enter the mount namespace and become an unprivileged user.

    Without the latter the box's processes would be root's in the kernel's eyes: no process limit, /proc/sys writable.
    """
    if mounts is not None and libc.setns(mounts, 0) != 0:
        raise OSError(ctypes.get_errno(), "setns")
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def _open_to_all(path: Path) -> bool:
    return all(step.stat().st_mode & stat.S_IXOTH for step in (path, *path.parents))
