"""The sandbox's pool: programs running at once, each in its box, and their verdicts."""

import contextlib
import os
import secrets
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence

from ba_lora.errors import UserError
from eval.sandbox.box import Box
from eval.sandbox.jobs import EXITED, FAILED, MEMORY, OUTPUT, PASSED, TIMEOUT, UNSAFE, Job, Verdict
from eval.sandbox.launcher import Launcher
from eval.sandbox.usage import memory_kills

WATCH_S = 0.1  # between looks at what a box uses


class Pool:
    """Keeps `workers` programs running, and boxes for the next ones started meanwhile."""

    def __init__(
        self, launcher: Launcher, jobs: Sequence[Job], *, workers: int, progress: Callable[[int], object] | None
    ) -> None:
        self.launcher = launcher
        self.jobs = jobs
        self.workers = workers
        self.progress = progress
        self.verdicts: list[Verdict | None] = [None] * len(jobs)
        self.waiting = deque(range(len(jobs)))
        self.boxes: list[Box] = []
        self.selector = selectors.DefaultSelector()
        self.next_watch = 0.0
        self.killed: set[int] = set()  # jobs that were killed once and run again

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
            box = Box(self.launcher, next(slot for slot in range(len(taken) + 1) if slot not in taken))
            self.boxes.append(box)
            self.selector.register(box.control, selectors.EVENT_READ, (box, self._hear))
            self.selector.register(box.output, selectors.EVENT_READ, (box, self._count_output))
            self.selector.register(box.ended, selectors.EVENT_READ, (box, self._bury))

    def _wait(self) -> None:
        now = time.monotonic()
        pause_s = min([WATCH_S, *(box.deadline - now for box in self.boxes)])
        happened: dict[Box, set] = {}
        for key, _ in self.selector.select(max(0.0, pause_s)):
            box, handler = key.data
            happened.setdefault(box, set()).add(handler)
        for box, handlers in happened.items():
            for handler in (self._count_output, self._hear, self._bury):  # what was said counts before the end
                if handler in handlers and box in self.boxes:
                    handler(box)
        now = time.monotonic()
        watch = now > self.next_watch
        if watch:
            self.next_watch = now + WATCH_S
        for box in [box for box in self.boxes if now > box.deadline or (watch and box.job is not None)]:
            if box.job is None:
                self._settle(box, Verdict(TIMEOUT))  # it has not started
            elif verdict := box.look():
                self._settle(box, verdict)

    def _watch_writes(self, box: Box) -> None:
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

    def _hear(self, box: Box) -> None:
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

    def _count_output(self, box: Box) -> None:
        with contextlib.suppress(BlockingIOError):
            part = os.read(box.output, 65536)
            if not part:
                self.selector.unregister(box.output)
            box.output_size += len(part)
            box.first_output = (box.first_output + part)[:2000]
        if box.output_size > self.launcher.limits.output_bytes:
            self._settle(box, Verdict(OUTPUT, f"more than {self.launcher.limits.output_bytes} bytes"))

    def _bury(self, box: Box) -> None:
        """The child or its box has ended without a verdict."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            box.process.wait(timeout=0.2)
        status = box.process.returncode  # None: it goes on, but has closed the checker's line
        if box.job is None:
            with contextlib.suppress(OSError):
                box.first_output += os.read(box.output, 2000)
            raise UserError(start_error(box.first_output.decode("utf-8", "replace")))
        number = -status if status is not None and status < 0 else (status or 0) - 128
        if number == signal.SIGKILL and box.usage.cpu_s < self.launcher.limits.whole_cpu_s:
            self._judge_killed(box)
            return
        if number in (signal.SIGXCPU, signal.SIGKILL):
            verdict = Verdict(TIMEOUT, f"{self.launcher.limits.cpu_s:g} s of CPU")
        elif number > 0:
            name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
            verdict = Verdict(EXITED, f"signal {name}")
        else:
            verdict = Verdict(EXITED, "the checker's line was closed" if status is None else f"status {status}")
        self._settle(box, verdict)

    def _judge_killed(self, box: Box) -> None:
        """Killed within its limits, by a machine out of memory or by itself: run it again, behind all others. Raises
        UserError where it is killed again, and the machine was out of memory."""
        if box.job not in self.killed:
            self.killed.add(box.job)
            self.waiting.append(box.job)
            self._drop(box)
            return
        if memory_kills() != box.memory_kills:
            raise UserError(
                "the machine is out of memory and has killed a program of the sandbox twice: run fewer at once, with "
                f"workers={max(1, self.workers // 2)}"
            )
        self._settle(box, Verdict(EXITED, "signal SIGKILL"))

    def _settle(self, box: Box, verdict: Verdict) -> None:
        index = box.job
        self._drop(box)
        if index is None:
            raise UserError(f"a box of the sandbox does not start ({verdict}); {UNSAFE}")
        self.verdicts[index] = verdict
        if self.progress:
            self.progress(1)

    def _drop(self, box: Box) -> None:
        for registered in (box.control, box.output, box.ended):
            with contextlib.suppress(KeyError, ValueError):  # not registered any more
                self.selector.unregister(registered)
        self.boxes.remove(box)
        box.stop()


def start_error(words: str) -> str:
    said = " ".join(words.split())[:200] or "no reason given"
    return (
        f"bubblewrap cannot make a box here ({said}): allow user namespaces (sysctl "
        "kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; in a container: run it "
        f"with --privileged); {UNSAFE}"
    )
