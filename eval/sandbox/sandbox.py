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

Where bubblewrap or user namespaces are missing nothing runs: `Sandbox` raises UserError with the way to fix it.
`unsafe` runs programs as plain child processes with the same limits but processes and disk; it is for machines that
one can lose.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Sequence

from ba_lora.errors import UserError
from eval.sandbox.jobs import FAILED, PASSED, Job, Verdict
from eval.sandbox.launcher import Launcher
from eval.sandbox.pool import Pool

KNOWN_LIMITS = (
    "a program may return objects whose comparisons always say yes",
    "a program may inspect the frames and memory of checker and tests, change what it finds there, or speak the "
    "checker's protocol and send the nonce",
    "a program may change what the tests' modules keep in C (the classes registered with an abc), or modules that they "
    "import only when they are called",
)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Sandbox(Launcher):
    """Runs jobs in boxes. Use as a context manager: `with Sandbox() as sandbox: sandbox.run(jobs)`.

    kind: "bubblewrap", or "unsafe". Entering it tries one program that must pass and one that must not.
    Raises UserError in one line where boxes cannot be made.
    """

    def __enter__(self) -> "Sandbox":
        if sys.platform != "linux":
            raise UserError(
                f"generated programs run on Linux only, not on {sys.platform}: score the file on such a machine"
            )
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            if self.kind == "bubblewrap":
                self.prepare()
            probes = self.run([Job("x = 1", "assert x == 1"), Job("x = 1", "assert x == 2")], workers=2)
            if [probe.status for probe in probes] != [PASSED, FAILED]:
                raise UserError(
                    f"the sandbox misjudges a trivial program ({probes[0]}; {probes[1]}): nothing is graded"
                )
            undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(
        self, jobs: Sequence[Job], *, workers: int | None = None, progress: Callable[[int], object] | None = None
    ) -> list[Verdict]:
        """Return the verdicts of `jobs`, in order. workers: programs running at once (None: one a core);
        progress: called with 1 after each."""
        return Pool(self, jobs, workers=max(1, workers or cores()), progress=progress).run()
