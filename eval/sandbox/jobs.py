"""What a box of the sandbox is given and gives back: a job, its limits, its verdict."""

import math
from dataclasses import dataclass

PASSED, FAILED, EXITED, TIMEOUT, MEMORY, OUTPUT = "passed", "failed", "exited early", "timeout", "memory", "output"

MIB = 2**20
PATIENCE = 10  # the longest that a box may take, in wall_s
UNSAFE = "on a machine you can lose, sandbox=unsafe runs them without isolation"


@dataclass(frozen=True)
class Limits:
    """What one program may use. They change scores, so every result stores them.

    cpu_s counts the seconds of all processes of a box together (rounded up to whole ones). wall_s ends what sleeps:
    time in which a thread of the box was ready to run and had no processor is added to it, up to `PATIENCE` times
    wall_s in all, so that a busy machine fails nobody. memory_bytes: address space of each process, and resident memory
    of all processes of a box together.
    """

    cpu_s: float = 5.0
    wall_s: float = 20.0
    memory_bytes: int = 1024 * MIB
    processes: int = 32
    file_bytes: int = 16 * MIB
    disk_bytes: int = 64 * MIB
    open_files: int = 64
    output_bytes: int = MIB

    @property
    def whole_cpu_s(self) -> int:
        return max(1, math.ceil(self.cpu_s))


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
