"""Algebraic equality of LaTeX answers by math-verify, in worker processes with a time limit that holds.

math-verify's own limit is a Python signal handler: it needs the main thread, and it never runs while one long C call
(a power tower of integers) is going on. Here each worker is a process of its own with two limits: an alarm inside it,
which costs nothing, and, one second later, its death by the parent's hand (or, should the parent be gone, by a kernel
timer), after which a fresh worker takes over. Memory of a worker is limited too.

Run as a script, this file is the worker: it reads one JSON array [gold, answer] a line and writes a verdict a line.
"""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

EQUAL, DIFFERENT, TIMEOUT, FAILED = "equal", "different", "timeout", "failed"
READY = "ready"
GRACE_S = 1.0  # between the alarm inside a worker and its death
START_LIMIT_S = 120.0
MEMORY_BYTES = 4 * 2**30
PAIRS_PER_WORKER = 50  # fewer pairs than this are not worth another process


class EqualityError(RuntimeError):
    """The workers cannot run at all (math-verify missing or broken)."""


class _Worker:
    def __init__(self, timeout_s: float) -> None:
        # -P: this folder's file names must not shadow the standard library's
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).resolve()), str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        )
        self.ready = False
        self.index: int | None = None
        self.deadline = time.monotonic() + START_LIMIT_S

    def send(self, index: int, pair: tuple[str, str], limit_s: float) -> None:
        self.index = index
        self.deadline = time.monotonic() + limit_s
        with contextlib.suppress(BrokenPipeError):  # it has died: the parent sees the end of its output
            self.process.stdin.write((json.dumps(pair) + "\n").encode())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def compare(
    pairs: Sequence[tuple[str, str]],
    *,
    workers: int | None = None,
    timeout_s: float = 5.0,
    progress: Callable[[int], object] | None = None,
) -> list[str]:
    """Return for each pair (gold, answer) "equal", "different", "timeout" or "failed" (its worker died), in order.

    workers: at most this many processes (None: one a core); timeout_s: limit for one pair;
    progress: called with 1 after each pair. Raises EqualityError when the workers cannot start.
    """
    verdicts: list[str | None] = [None] * len(pairs)
    waiting = deque(range(len(pairs)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = max(1, min(workers or cores, -(-len(pairs) // PAIRS_PER_WORKER)))
    selector = selectors.DefaultSelector()
    alive: list[_Worker] = []

    def start() -> None:
        worker = _Worker(timeout_s)
        alive.append(worker)
        selector.register(worker.process.stdout, selectors.EVENT_READ, worker)

    def end(worker: _Worker) -> None:
        selector.unregister(worker.process.stdout)
        alive.remove(worker)
        worker.stop()

    def settle(worker: _Worker, verdict: str) -> None:
        verdicts[worker.index] = verdict
        worker.index = None
        if progress:
            progress(1)

    def feed(worker: _Worker) -> None:
        if waiting:
            index = waiting.popleft()
            worker.send(index, pairs[index], timeout_s + GRACE_S)
        else:
            end(worker)

    def lose(worker: _Worker, verdict: str) -> None:
        """The worker is dead or past its limit: settle its pair and, where work is left, start another."""
        if not worker.ready:
            raise EqualityError("the workers that compare answers cannot start: is math-verify installed?")
        settle(worker, verdict)
        end(worker)
        if waiting:
            start()

    try:
        for _ in range(count if pairs else 0):
            start()
        while alive:
            pause_s = max(0.0, min(worker.deadline for worker in alive) - time.monotonic())
            for key, _ in selector.select(pause_s):
                worker = key.data
                line = os.read(worker.process.stdout.fileno(), 64).decode().strip()
                if not line:
                    late = time.monotonic() > worker.deadline - GRACE_S
                    lose(worker, TIMEOUT if late else FAILED)
                    continue
                if line == READY:
                    worker.ready = True
                else:
                    settle(worker, line)
                feed(worker)
            now = time.monotonic()
            for worker in [worker for worker in alive if now > worker.deadline]:
                lose(worker, TIMEOUT)
    finally:
        for worker in list(alive):
            end(worker)
        selector.close()
    return verdicts


class _Alarm(BaseException):
    """Not an Exception, so that the libraries' own handlers let it pass."""


def _clearly_different(gold: list, answer: list) -> bool:
    """Return whether two scalar expressions differ by more than rounding at a fixed positive point.

    A shortcut past math-verify's `simplify`, whose cost is spent mostly on wrong answers. Lists as `parse` returns
    them: the expression, then its text. Anything but scalars (sets, relations, lone symbols, …) is left to `verify`.
    """
    from sympy import Expr, Rational, Symbol

    pair = gold[:1] + answer[:1]
    if len(pair) < 2 or not all(isinstance(part, Expr) and not isinstance(part, Symbol) for part in pair):
        return False
    try:
        symbols = sorted(pair[0].free_symbols | pair[1].free_symbols, key=str)
        point = {symbol: Rational(7 + 4 * index, 5 + index) for index, symbol in enumerate(symbols)}
        left, right = (complex(part.subs(point).evalf(15)) for part in pair)
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError):
        return False
    # 1e-4 leaves room for the six decimals to which math-verify rounds; NaN and infinities compare False.
    return abs(left - right) > 1e-4 * max(1.0, abs(left)) and abs(left) < 1e300 and abs(right) < 1e300


def _work(timeout_s: float) -> None:
    """Serve pairs from stdin until it closes."""
    import gc
    import logging
    import resource
    import signal

    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like a verdict
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    def ring(signum: int, frame: object) -> None:
        raise _Alarm

    def parsed(text: str) -> list:
        return parse(
            f"\\boxed{{{text}}}",
            extraction_config=[LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()],
            parsing_timeout=None,
        )

    known: dict[str, list] = {}  # golds come up again with every sample
    signal.signal(signal.SIGALRM, ring)
    parsed("1")  # the grammar is built on first use
    gc.freeze()  # what is loaded now stays: collecting over it again and again costs a sixth of the time
    gc.set_threshold(100_000, 20, 20)
    out.write(READY + "\n")
    for line in sys.stdin:
        gold, answer = json.loads(line)
        # The kernel's own timer, on CPU time: SIGVTALRM keeps its default action, the death of the process.
        signal.setitimer(signal.ITIMER_VIRTUAL, timeout_s + 2 * GRACE_S)
        try:
            # Repeated, since a bare `except:` in a library may swallow one alarm.
            signal.setitimer(signal.ITIMER_REAL, timeout_s, 0.2)
            if gold not in known:
                known[gold] = parsed(gold)
            expressions = parsed(answer)
            if _clearly_different(known[gold], expressions):
                verdict = DIFFERENT
            else:
                verdict = EQUAL if verify(known[gold], expressions, timeout_seconds=None) else DIFFERENT
        except _Alarm:
            verdict = TIMEOUT
        except (Exception, RecursionError, MemoryError):
            verdict = DIFFERENT  # what cannot be read as mathematics is not equal
        finally:
            with contextlib.suppress(_Alarm):
                signal.setitimer(signal.ITIMER_REAL, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        out.write(verdict + "\n")


if __name__ == "__main__":
    _work(float(sys.argv[1]))
