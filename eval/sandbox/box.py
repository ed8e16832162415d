"""One box of the sandbox: what it may use, what it is asked, how it is started, watched and ended."""

import contextlib
import json
import marshal
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import time

from ba_lora.errors import UserError
from eval.sandbox.jobs import (
    MEMORY,
    OUTPUT,
    PATIENCE,
    TIMEOUT,
    UNSAFE,
    Job,
    Verdict,
)
from eval.sandbox.launcher import Launcher
from eval.sandbox.usage import Usage, memory_kills

START_LIMIT_S = 60.0
END_LIMIT_S = 2
MAX_FILES = 10_000  # in the tmpfs: empty files cost kernel memory that no size limit counts
MAX_SOCKETS = 32  # so do their buffers


class Box:
    """One started box: its process, the socket to the child inside, its output, and how far it has come."""

    def __init__(self, launcher: Launcher, slot: int) -> None:
        self.slot = slot
        self.launcher = launcher
        self.job: int | None = None
        self.ready = self.loaded = False
        self.received = b""
        self.outgoing = b""
        self.output_size = 0
        self.first_output = b""
        self.deadline = time.monotonic() + START_LIMIT_S
        self.begun = 0.0
        self.usage: Usage | None = None  # from the beginning of its job
        self.memory_kills: int | None = None  # of the machine, before its job
        self.nonce = self.key = b""
        self.first_process: int | None = None  # pidfd of the box's pid 1
        self.first_pid: int | None = None
        self.folder: str | None = None
        self.control, theirs = socket.socketpair()
        self.output, printed = os.pipe()
        with launcher.start(slot) as (command, arguments):
            self.information: int | None = arguments.pop("information", None)
            if launcher.kind == "unsafe":
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
        limits = self.launcher.limits
        self.learn()
        self.job = index
        self.key, self.nonce = (secrets.token_hex(16).encode() for _ in range(2))
        cpu_s = limits.whole_cpu_s
        table = {
            "RLIMIT_CPU": (cpu_s, cpu_s + 1),
            "RLIMIT_AS": (limits.memory_bytes,) * 2,
            "RLIMIT_FSIZE": (limits.file_bytes,) * 2,
            "RLIMIT_NOFILE": (limits.open_files,) * 2,
            "RLIMIT_CORE": (0, 0),
            "RLIMIT_MEMLOCK": (0, 0),  # pages that a socket holds without a copy count as locked
        }
        if self.launcher.kind != "unsafe":  # there it would count all of the user's processes
            table["RLIMIT_NPROC"] = (limits.processes,) * 2
        frame = {"program": job.program, "modules": job.modules, "names": job.names, "key": self.key}
        # without a process namespace of its own the child cannot tell the program's processes from others
        self.send(frame | {"limits": table, "own_processes": self.launcher.kind != "unsafe"})
        self.usage = Usage(
            self.first_pid or self.process.pid,
            memory_limit=limits.memory_bytes,
            boxed=self.first_pid is not None,
        )
        self.memory_kills = memory_kills()
        self.begun = time.monotonic()
        self.deadline = self.begun + limits.wall_s

    def look(self) -> Verdict | None:
        """Return the verdict on a box that uses too much, None for the others. Sets the deadline again."""
        limits, usage = self.launcher.limits, self.usage
        usage.look()
        self.deadline = self.begun + min(limits.wall_s + usage.waited_s, PATIENCE * limits.wall_s)
        if usage.memory_bytes > limits.memory_bytes:
            return Verdict(MEMORY)
        if usage.num_files > MAX_FILES:
            return Verdict(OUTPUT, f"more than {MAX_FILES} files")
        if usage.num_sockets > MAX_SOCKETS:
            return Verdict(OUTPUT, f"more than {MAX_SOCKETS} sockets")
        if usage.cpu_s > limits.whole_cpu_s:
            return Verdict(TIMEOUT, f"{limits.cpu_s:g} s of CPU")
        if time.monotonic() > self.deadline:
            return Verdict(TIMEOUT, f"{limits.wall_s:g} s of time")
        return None

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
        elif self.launcher.kind == "unsafe":
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
