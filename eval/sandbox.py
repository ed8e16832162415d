"""Generated programs run here: each in a box of its own, made by bubblewrap, and never outside one unless told so.

A box has its own user, pid, ipc, network, mount, uts and cgroup namespaces; no network but an unconnected loopback; a
read-only Python and /usr, no home, no repository; one small tmpfs, /tmp, as the only writable place; an environment of
four fixed variables; no_new_privs, no capabilities, and a seccomp filter for what namespaces do not cover (ptrace,
System V and other memory outside the accounts, nested namespaces, keys, bpf, …). Limits: CPU seconds, wall seconds,
memory (address space of a process, resident memory of the box), processes, file size, disk, open files, output. A box
ends by SIGKILL of its first process, which takes every process in it along, and with the death of this one.

The verdict: the program is loaded, then the tests and a random nonce are sent, and only the nonce, returned after the
last test, means "passed" (see eval/sandbox_child.py). What a checker inside the program's process cannot stop is
named in `KNOWN_LIMITS`, and shown by tests.

Where bubblewrap or user namespaces are missing nothing runs: `Sandbox` raises UserError with the way to mend it.
`unsafe` runs programs as plain child processes with the same limits but processes and disk; it is for machines that
one can lose.
"""

import contextlib
import ctypes
import functools
import json
import marshal
import os
import platform
import secrets
import select
import selectors
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ba_lora.errors import UserError

KINDS = ("bubblewrap", "unsafe")
KNOWN_LIMITS = (
    "a program may return objects whose comparisons always say yes",
    "a program may inspect the checker's frames, take what it finds there, speak its protocol and send the nonce",
)
PASSED, FAILED, EXITED, TIMEOUT, MEMORY, OUTPUT = "passed", "failed", "exited early", "timeout", "memory", "output"

MIB = 2**20
MAX_FILES = 10_000  # in the tmpfs: empty files cost kernel memory that no size limit counts
START_LIMIT_S = 60.0
END_LIMIT_S = 2
WATCH_S = 0.1  # between looks at a box's memory
FIRST_UID = 64_000  # as root: boxes run as one of these 1000 unprivileged users
ENVIRONMENT = {"PATH": "/usr/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
INSTALL = "Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap; Arch: pacman -S bubblewrap"
UNSAFE = "on a machine you can lose, sandbox=unsafe runs them without isolation"


@dataclass(frozen=True)
class Limits:
    """What one program may use. They change scores, so every result stores them.

    cpu_s counts the program's own seconds (rounded up to whole ones), so that a busy machine fails nobody; wall_s ends
    what sleeps. memory_bytes: address space of each process, and resident memory of all processes of a box together.
    """

    cpu_s: float = 5.0
    wall_s: float = 20.0
    memory_bytes: int = 1024 * MIB
    processes: int = 32
    file_bytes: int = 16 * MIB
    disk_bytes: int = 64 * MIB
    open_files: int = 64
    output_bytes: int = MIB


@dataclass(frozen=True)
class Job:
    """A program and its tests.

    program: module text; tests: statements run after it, with the program's names in sight; modules: what the tests
    import (kept from the program's patches); names: names the tests take from the program although builtins have them.
    """

    program: str
    tests: str
    modules: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """status: one of the constants above; only PASSED is a pass. detail: what raised, in at most 200 characters."""

    status: str
    detail: str = ""

    @property
    def passed(self) -> bool:
        return self.status == PASSED

    def __str__(self) -> str:
        return f"{self.status}: {self.detail}" if self.detail else self.status


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Sandbox:
    """Runs jobs in boxes. Use as a context manager: `with Sandbox() as sandbox: sandbox.run(jobs)`.

    kind: "bubblewrap", or "unsafe". Entering it tries one program that must pass and one that must not.
    Raises UserError in one line where boxes cannot be made.
    """

    def __init__(self, *, kind: str = "bubblewrap", limits: Limits = Limits()) -> None:
        if kind not in KINDS:
            raise UserError(f"sandbox={kind} is unknown: choose one of {', '.join(KINDS)}")
        self.kind = kind
        self.limits = limits
        self._child = Path(__file__).with_name("sandbox_child.py").read_text(encoding="utf-8")
        self._prefix = Path(sys.base_prefix).resolve()
        self._executable = Path(sys._base_executable).resolve()
        self._mounts: int | None = None  # descriptor of a mount namespace in which other users reach Python
        self._cleanup = contextlib.ExitStack()

    def describe(self) -> dict:
        """Return what a result stores: kind, version, limits, and the Python that ran the programs."""
        return {
            "kind": self.kind,
            "version": _version() if self.kind == "bubblewrap" else None,
            "python": platform.python_version(),
            "limits": asdict(self.limits),
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
        if platform.machine() not in _SYSCALLS:
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
        return _Pool(self, jobs, workers=max(1, workers or cores()), progress=progress).run()

    @contextlib.contextmanager
    def _start(self, slot: int) -> Iterator["tuple[list[str], dict]"]:
        """Give the command line and the Popen arguments of a box."""
        run_child = ["-s", "-S", "-P", "-c", self._child]
        if self.kind == "unsafe":
            folder = tempfile.mkdtemp(prefix="ba-lora-unsafe-")
            yield [str(self._executable), *run_child], {"cwd": folder, "env": ENVIRONMENT | {"HOME": folder}}
            return
        information, told = os.pipe()
        filter_, filled = os.pipe()
        try:
            os.write(filled, _seccomp_filter(platform.machine()))
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
                user = FIRST_UID + (os.getpid() * 16 + slot) % 1000
                arguments["preexec_fn"] = functools.partial(_become, user, self._mounts, _libc())
            yield [*command, self._interpreter, *run_child], arguments
        finally:
            os.close(told)
            os.close(filter_)


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


class _Box:
    """One started box: its process, the socket to the child inside, its output, and how far it has come."""

    def __init__(self, sandbox: Sandbox, slot: int) -> None:
        self.slot = slot
        self.sandbox = sandbox
        self.job: int | None = None
        self.ready = self.loaded = False
        self.received = b""
        self.outgoing = b""
        self.output_size = 0
        self.first_output = b""
        self.deadline = time.monotonic() + START_LIMIT_S
        self.nonce = self.key = b""
        self.first_process: int | None = None  # pidfd of the box's pid 1
        self.first_pid: int | None = None
        self.folder: str | None = None
        self.control, theirs = socket.socketpair()
        self.output, printed = os.pipe()
        with sandbox._start(slot) as (command, arguments):
            self.information: int | None = arguments.pop("information", None)
            if sandbox.kind == "unsafe":
                self.folder = arguments["cwd"]
            try:
                self.process = subprocess.Popen(
                    command, stdin=theirs, stdout=printed, stderr=printed, start_new_session=True, **arguments
                )
            except (OSError, subprocess.SubprocessError) as error:
                raise UserError(f"the sandbox cannot start a process ({error}); {UNSAFE}") from error
            finally:
                theirs.close()
                os.close(printed)
        self.ended = os.pidfd_open(self.process.pid)
        self.control.setblocking(False)
        os.set_blocking(self.output, False)

    def learn(self) -> None:
        """Take hold of the box's first process, whose death ends all the others. Called before any job is sent."""
        if self.information is None:
            return
        told = b""
        while part := os.read(self.information, 4096):
            told += part
        os.close(self.information)
        self.information = None
        self.first_pid = json.loads(told)["child-pid"]
        self.first_process = os.pidfd_open(self.first_pid)

    def send(self, frame: dict) -> None:
        body = marshal.dumps(frame)
        self.outgoing += len(body).to_bytes(8, "big") + body

    def begin(self, index: int, job: Job) -> None:
        """Send the job; its time runs from now."""
        limits = self.sandbox.limits
        self.learn()
        self.job = index
        self.key, self.nonce = (secrets.token_hex(16).encode() for _ in range(2))
        cpu_s = max(1, -int(-limits.cpu_s // 1))
        table = {
            "RLIMIT_CPU": (cpu_s, cpu_s + 1),
            "RLIMIT_AS": (limits.memory_bytes,) * 2,
            "RLIMIT_FSIZE": (limits.file_bytes,) * 2,
            "RLIMIT_NOFILE": (limits.open_files,) * 2,
            "RLIMIT_CORE": (0, 0),
        }
        if self.sandbox.kind != "unsafe":  # there it would count all of the user's processes
            table["RLIMIT_NPROC"] = (limits.processes,) * 2
        frame = {"program": job.program, "modules": job.modules, "names": job.names, "key": self.key}
        self.send(frame | {"limits": table})
        self.deadline = time.monotonic() + limits.wall_s

    def memory_bytes(self) -> int:
        """Return the resident memory of all processes in the box (shared pages once, where the sum matters)."""
        pids, waiting = [], [self.first_pid or self.process.pid]
        while waiting:
            pid = waiting.pop()
            pids.append(pid)
            with contextlib.suppress(OSError):  # it has ended meanwhile
                for thread in os.listdir(f"/proc/{pid}/task"):
                    waiting += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
        resident = 0
        for pid in pids:
            with contextlib.suppress(OSError, IndexError):
                resident += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if resident <= self.sandbox.limits.memory_bytes:
            return resident
        proportional = 0
        for pid in pids:
            with contextlib.suppress(OSError, StopIteration):
                lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                proportional += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        return proportional

    def num_files(self) -> int:
        """Return how many files the box's tmpfs holds."""
        if self.first_pid is None:
            return 0
        try:
            space = os.statvfs(f"/proc/{self.first_pid}/root/tmp")
        except OSError:  # it has ended meanwhile
            return 0
        return space.f_files - space.f_ffree

    def stop(self) -> int:
        """Kill everything in the box, wait for its end, and return the exit status as bubblewrap tells it."""
        if self.first_process is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.first_process, signal.SIGKILL)
            gone = select.poll()  # the first process goes last: the kernel ends all the others before
            gone.register(self.first_process, select.POLLIN)
            gone.poll(1000 * END_LIMIT_S)
            os.close(self.first_process)
            self.first_process = None
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        elif self.sandbox.kind == "unsafe":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.control.close()
        os.close(self.output)
        os.close(self.ended)
        if self.information is not None:
            os.close(self.information)
            self.information = None
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.process.returncode


class _Pool:
    """Keeps `workers` programs running, and boxes for the next ones started meanwhile."""

    def __init__(
        self, sandbox: Sandbox, jobs: Sequence[Job], *, workers: int, progress: Callable[[int], object] | None
    ) -> None:
        self.sandbox = sandbox
        self.jobs = jobs
        self.workers = workers
        self.progress = progress
        self.verdicts: list[Verdict | None] = [None] * len(jobs)
        self.waiting = deque(range(len(jobs)))
        self.boxes: list[_Box] = []
        self.selector = selectors.DefaultSelector()
        self.next_watch = 0.0

    def run(self) -> list[Verdict]:
        try:
            while self.waiting or any(box.job is not None for box in self.boxes):
                self._fill()
                self._wait()
        finally:
            for box in list(self.boxes):
                self._drop(box)
            self.selector.close()
        return self.verdicts

    def _fill(self) -> None:
        """Give jobs to ready boxes, and start boxes ahead of need."""
        running = sum(box.job is not None for box in self.boxes)
        for box in self.boxes:
            if box.ready and box.job is None and self.waiting and running < self.workers:
                index = self.waiting.popleft()
                box.begin(index, self.jobs[index])
                self._watch_writes(box)
                running += 1
        spares = len(self.boxes) - running
        free = self.workers - running  # places for programs that no box fills yet
        for _ in range(min(len(self.waiting), self.workers + free) - spares):
            taken = {box.slot for box in self.boxes}
            box = _Box(self.sandbox, next(slot for slot in range(len(taken) + 1) if slot not in taken))
            self.boxes.append(box)
            self.selector.register(box.control, selectors.EVENT_READ, (box, self._hear))
            self.selector.register(box.output, selectors.EVENT_READ, (box, self._count_output))
            self.selector.register(box.ended, selectors.EVENT_READ, (box, self._bury))

    def _wait(self) -> None:
        now = time.monotonic()
        pause_s = min([WATCH_S, *(box.deadline - now for box in self.boxes)])
        happened: dict[_Box, set] = {}
        for key, _ in self.selector.select(max(0.0, pause_s)):
            box, handler = key.data
            happened.setdefault(box, set()).add(handler)
        for box, handlers in happened.items():
            for handler in (self._count_output, self._hear, self._bury):  # what was said counts before the end
                if handler in handlers and box in self.boxes:
                    handler(box)
        now = time.monotonic()
        for box in [box for box in self.boxes if now > box.deadline]:
            self._settle(box, Verdict(TIMEOUT, f"{self.sandbox.limits.wall_s:g} s of time"))
        if now > self.next_watch:
            self.next_watch = now + WATCH_S
            for box in [box for box in self.boxes if box.job is not None]:
                if box.memory_bytes() > self.sandbox.limits.memory_bytes:
                    self._settle(box, Verdict(MEMORY))
                elif box.num_files() > MAX_FILES:
                    self._settle(box, Verdict(OUTPUT, f"more than {MAX_FILES} files"))

    def _watch_writes(self, box: _Box) -> None:
        """Send what can be sent, and listen for room for the rest."""
        try:
            while box.outgoing:
                box.outgoing = box.outgoing[box.control.send(box.outgoing[: 64 * 1024]) :]
        except BlockingIOError:
            pass
        except (BrokenPipeError, ConnectionResetError):  # it has died; `_bury` will say so
            box.outgoing = b""
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if box.outgoing else 0)
        self.selector.modify(box.control, wanted, (box, self._hear))

    def _hear(self, box: _Box) -> None:
        """Read the child's lines; the only way to pass is here."""
        if box.outgoing:
            self._watch_writes(box)
        try:
            heard = box.control.recv(4096)
        except BlockingIOError:
            return
        except ConnectionResetError:
            heard = b""
        if not heard:  # closed: the child has ended, or the program closed it; either way no verdict will come
            self.selector.unregister(box.control)
            self._bury(box)
            return
        box.received += heard
        while b"\n" in box.received and box in self.boxes:
            line, _, box.received = box.received.partition(b"\n")
            if not box.ready and line == b"R":
                box.ready = True
                box.deadline = float("inf")  # until it gets a job
            elif box.job is None:
                self._settle(box, Verdict(FAILED, "the box spoke before its job"))
            elif not box.loaded and secrets.compare_digest(line, b"L " + box.key):
                box.loaded = True
                box.send({"tests": self.jobs[box.job].tests, "nonce": box.nonce})
                self._watch_writes(box)
            elif box.loaded and secrets.compare_digest(line, b"P " + box.nonce):
                self._settle(box, Verdict(PASSED))
            else:
                told = line.removeprefix(b"F ").decode("utf-8", "replace")
                told = "".join(letter if letter.isprintable() else " " for letter in told)[:200]
                self._settle(box, Verdict(MEMORY if told.startswith("MemoryError") else FAILED, told))
        if len(box.received) > 4096 and box in self.boxes:
            self._settle(box, Verdict(OUTPUT, "noise on the checker's line"))

    def _count_output(self, box: _Box) -> None:
        with contextlib.suppress(BlockingIOError):
            part = os.read(box.output, 65536)
            if not part:
                self.selector.unregister(box.output)
            box.output_size += len(part)
            box.first_output = (box.first_output + part)[:2000]
        if box.output_size > self.sandbox.limits.output_bytes:
            self._settle(box, Verdict(OUTPUT, f"more than {self.sandbox.limits.output_bytes} bytes"))

    def _bury(self, box: _Box) -> None:
        """The child or its box has ended without a verdict."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            box.process.wait(timeout=0.2)
        status = box.process.returncode  # None: it goes on, but has closed the checker's line
        if box.job is None:
            with contextlib.suppress(OSError):
                box.first_output += os.read(box.output, 2000)
            raise UserError(_start_error(box.first_output.decode("utf-8", "replace")))
        number = -status if status is not None and status < 0 else (status or 0) - 128
        if number in (signal.SIGXCPU, signal.SIGKILL):
            verdict = Verdict(TIMEOUT, f"{self.sandbox.limits.cpu_s:g} s of CPU")
        elif number > 0:
            name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
            verdict = Verdict(EXITED, f"signal {name}")
        else:
            verdict = Verdict(EXITED, "the checker's line was closed" if status is None else f"status {status}")
        self._settle(box, verdict)

    def _settle(self, box: _Box, verdict: Verdict) -> None:
        index = box.job
        self._drop(box)
        if index is None:
            raise UserError(f"a box of the sandbox does not start ({verdict}); {UNSAFE}")
        self.verdicts[index] = verdict
        if self.progress:
            self.progress(1)

    def _drop(self, box: _Box) -> None:
        for registered in (box.control, box.output, box.ended):
            with contextlib.suppress(KeyError, ValueError):  # not registered any more
                self.selector.unregister(registered)
        self.boxes.remove(box)
        box.stop()


def _start_error(words: str) -> str:
    said = " ".join(words.split())[:200] or "no reason given"
    return (
        f"bubblewrap cannot make a box here ({said}): allow user namespaces (sysctl "
        "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container: run it "
        f"with --privileged); {UNSAFE}"
    )


# ---- the seccomp filter: classic BPF over (number, architecture, arguments) of a system call

# Denied with EPERM: tracing other processes; memory that belongs to no process (System V, memfd, …); mounts and
# namespaces; keys, bpf, io_uring and other kernel interfaces that no tested program needs.
_DENIED = {
    "x86_64": (
        29, 30, 31, 64, 68, 101, 135, 154, 155, 161, 163, 165, 166, 167, 172, 173, 175, 179, 212, 240, 246, 248, 249,
        250, 272, 298, 300, 303, 304, 308, 310, 311, 312, 313, 319, 320, 321, 323, 425, 426, 427, 428, 429, 430, 431,
        432, 433, 438, 440, 442, 447,
    ),
    "aarch64": (
        39, 40, 41, 51, 60, 89, 92, 97, 104, 105, 117, 180, 186, 190, 194, 195, 196, 217, 218, 219, 224, 241, 262, 264,
        265, 268, 270, 271, 272, 273, 279, 280, 282, 294, 425, 426, 427, 428, 429, 430, 431, 432, 433, 438, 440, 442,
        447,
    ),
}  # fmt: skip
# machine → (audit architecture, number of clone)
_SYSCALLS = {"x86_64": (0xC000003E, 56), "aarch64": (0xC00000B7, 220)}
_CLONE3 = 435
_NEW_NAMESPACES = 0x7E020080  # CLONE_NEW{USER,PID,NET,IPC,UTS,CGROUP,NS,TIME}
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000


@functools.cache
def _seccomp_filter(machine: str) -> bytes:
    """Return the filter as struct sock_filter[]."""
    architecture, clone = _SYSCALLS[machine]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    lines = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (give, 0, 0, _KILL),
        (load, 0, 0, 0),
        (at_least, 0, 1, 0x40000000),  # the x32 numbers
        (give, 0, 0, _ERRNO | 1),
        (equal, 0, 1, _CLONE3),  # its flags lie in memory, where no filter sees them: ENOSYS, and libc takes clone
        (give, 0, 0, _ERRNO | 38),
        (equal, 0, 4, clone),
        (load, 0, 0, 16),
        (any_bit, 0, 1, _NEW_NAMESPACES),
        (give, 0, 0, _ERRNO | 1),
        (give, 0, 0, _ALLOW),
    ]
    for number in _DENIED[machine]:
        lines += [(equal, 0, 1, number), (give, 0, 0, _ERRNO | 1)]
    lines.append((give, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
