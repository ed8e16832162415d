"""What a box of the sandbox uses, as /proc tells: memory, CPU, files, sockets, and the time it waits for a processor.

Control groups would tell more, but need rights that users rarely have.
"""

import contextlib
import os
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")


def memory_kills() -> int | None:
    """Return how many processes the kernel has killed for want of memory since it started; None where it tells none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


class Usage:
    """Of the process `first_pid` and all below it, at the last `look`.

    memory_bytes: resident memory, swap and page tables of all processes (shared pages once, where the sum is over
    `memory_limit`). cpu_s: of all processes, those that have ended included. waited_s: the longest that one of the
    threads was ready to run and had no processor. num_files, num_sockets: in the box's /tmp and network (0 without a
    box of its own).
    """

    def __init__(self, first_pid: int, *, memory_limit: int, boxed: bool) -> None:
        self.first_pid = first_pid
        self.memory_limit = memory_limit
        self.boxed = boxed
        self.memory_bytes = self.num_files = self.num_sockets = 0
        self.cpu_s = self.waited_s = 0.0
        self._own_ticks: dict[tuple[int, str], int] = {}  # (pid, when it started) → its CPU when it was last seen

    def look(self) -> None:
        pids = self._processes()
        self.cpu_s = max(self.cpu_s, self._cpu_ticks(pids) / TICKS)
        self.memory_bytes = self._memory(pids)
        if self.boxed:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                space = os.statvfs(f"/proc/{self.first_pid}/root/tmp")
                self.num_files = space.f_files - space.f_ffree
                told = Path(f"/proc/{self.first_pid}/net/sockstat").read_text()
                self.num_sockets = int(told.partition("sockets: used ")[2].split()[0])

    def _processes(self) -> list[int]:
        pids, waiting = [], [self.first_pid]
        while waiting:
            pid = waiting.pop()
            pids.append(pid)
            with contextlib.suppress(OSError):  # it has ended meanwhile; so in all that follows
                for thread in os.listdir(f"/proc/{pid}/task"):
                    waiting += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
                    with contextlib.suppress(OSError):
                        waited = Path(f"/proc/{pid}/task/{thread}/schedstat").read_text().split()[1]
                        self.waited_s = max(self.waited_s, int(waited) / 1e9)
        return pids

    def _cpu_ticks(self, pids: list[int]) -> int:
        """Count twice, since each count misses something, and return the larger.

        A process's own account holds the children that it has waited for, but none that ended unwaited for; the sum
        over all processes ever seen holds these, but not what ended between two looks.
        """
        accounted = 0
        for pid in pids:
            with contextlib.suppress(OSError):
                values = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
                own, waited_for = (sum(map(int, values[place : place + 2])) for place in (11, 13))
                accounted += own + waited_for
                self._own_ticks[pid, values[19]] = own
        return max(accounted, sum(self._own_ticks.values()))

    def _memory(self, pids: list[int]) -> int:
        resident = sum(_kilobytes(pid, "status", ("VmRSS:", "VmSwap:", "VmPTE:")) for pid in pids) * 1024
        if resident <= self.memory_limit:
            return resident
        return sum(_kilobytes(pid, "smaps_rollup", ("Pss:", "SwapPss:")) for pid in pids) * 1024


def _kilobytes(pid: int, file: str, names: tuple[str, ...]) -> int:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(names))
    return 0
