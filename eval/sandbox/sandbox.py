"""Generated programs run here: each in a box of its own, made by bubblewrap, and never outside one unless told so.

A box has its own user, pid, ipc, network, mount, uts and cgroup namespaces; no network but an unconnected loopback; a
read-only Python and /usr, no home, no repository; one small tmpfs, /tmp, as the only writable place; an environment of
four fixed variables; no_new_privs, no capabilities, and a seccomp filter for what namespaces do not cover (ptrace,
System V, shared and other memory outside the accounts, nested namespaces, sockets but Unix, TCP and UDP ones, keys,
bpf, …). Limits: CPU seconds and memory of the box (address space of each process, resident memory of all), wall
seconds, processes, file size, disk, open files, sockets, output. A box ends by SIGKILL of its first process, which
takes every process in it along, and with the death of this one.

The verdict: the program is loaded, then the tests and a random nonce are sent, and only the nonce, returned after the
last test, means "passed" (see eval/sandbox/child.py). A program that leaves threads or processes running, when it has
been loaded or after the tests, has failed. What a checker inside the program's process cannot stop is named in
`KNOWN_LIMITS`, and shown by tests.

Control groups are not used, since they need rights that users rarely have: a look at each box every tenth of a second
(eval/sandbox/usage.py) sums CPU and resident memory of its processes, and a box that is over a limit is ended. Within
that tenth it can be over it, by what its processes can do in that time, and up to the limits of each process.

Where bubblewrap or user namespaces are missing nothing runs: `Sandbox` raises UserError with the way to mend it.
`unsafe` runs programs as plain child processes with the same limits but processes and disk; it is for machines that
one can lose.
"""

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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from ba_lora.errors import UserError
from eval.sandbox.box import FAILED, PASSED, UNSAFE, Job, Limits, Verdict
from eval.sandbox.pool import Pool
from eval.sandbox.seccomp import MACHINES, seccomp_filter

KINDS = ("bubblewrap", "unsafe")
KNOWN_LIMITS = (
    "a program may return objects whose comparisons always say yes",
    "a program may inspect the frames and memory of checker and tests, change what it finds there, or speak the "
    "checker's protocol and send the nonce",
    "a program may change what the tests' modules keep in C (the classes registered with an abc), or modules that they "
    "import only when they are called",
)
FIRST_UID, NUM_UIDS = 64_000, 1000  # the unprivileged users that boxes run as where the grader is root
ENVIRONMENT = {"PATH": "/usr/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
INSTALL = "Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap; Arch: pacman -S bubblewrap"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Sandbox:
    """Runs jobs in boxes. Use as a context manager: `with Sandbox() as sandbox: sandbox.run(jobs)`.

    kind: "bubblewrap", or "unsafe". Entering it tries one program that must pass and one that must not.
    Raises UserError in one line where boxes cannot be made.
    """

    def __init__(self, *, kind: str = "bubblewrap", limits: Limits | None = None) -> None:
        if kind not in KINDS:
            raise UserError(f"sandbox={kind} is unknown: choose one of {', '.join(KINDS)}")
        self.kind = kind
        self.limits = limits or Limits()
        self._child = Path(__file__).with_name("sandbox_child.py").read_text(encoding="utf-8")
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

    def __enter__(self) -> "Sandbox":
        if sys.platform != "linux":
            raise UserError(
                f"generated programs run on Linux only, not on {sys.platform}: score the file on such a machine"
            )
        with contextlib.ExitStack() as undo:
            undo.callback(self._cleanup.close)
            if self.kind == "bubblewrap":
                self._prepare()
            probes = self.run([Job("x = 1", "assert x == 1"), Job("x = 1", "assert x == 2")], workers=2)
            if [probe.status for probe in probes] != [PASSED, FAILED]:
                raise UserError(
                    f"the sandbox misjudges a trivial program ({probes[0]}; {probes[1]}): nothing is graded"
                )
            undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._cleanup.close()
        self._mounts = None

    def _prepare(self) -> None:
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

    def run(
        self, jobs: Sequence[Job], *, workers: int | None = None, progress: Callable[[int], object] | None = None
    ) -> list[Verdict]:
        """Return the verdicts of `jobs`, in order. workers: programs running at once (None: one a core);
        progress: called with 1 after each."""
        return Pool(self, jobs, workers=max(1, workers or cores()), progress=progress).run()

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
