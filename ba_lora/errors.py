"""The one exception for what a user can fix: its message is a single line that names the cause and the fix."""

import argparse
import atexit
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from typing import Any, NoReturn

INCOMPLETE = 3  # the exit status of a report that is whole, but whose page lacks something


class UserError(ValueError):
    """Something in the user's hands is wrong: a file, a key, a missing package. Entry points print it and exit 2."""


class CommandParser(argparse.ArgumentParser):
    """A parser of command lines whose complaint is a UserError, one line, too; it calls no `nargs="*"` required."""

    def add_argument(self, *names: str, **settings: Any) -> argparse.Action:
        if settings.get("nargs") == "*" and not names[0].startswith("-"):
            settings.setdefault("default", [])
        return super().add_argument(*names, **settings)

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see {self.prog} --help")


def in_one_line(error: Exception, *, limit: int = 400) -> str:
    """Return what a library says in one line, without the headline that stands before a list of details."""
    headline, _, details = str(error).strip().partition("\n")
    text = " ".join((details or headline).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} …"


def run_entry_point(main: Callable[[], int | None], *, resumes: bool = False) -> NoReturn:
    """Call `main()` and leave the process: its status, or 2 with one line on stderr after a `UserError`.

    Of several processes that fail together, only the first speaks: the others wait to be ended by the launcher, and
    speak, with their rank, when nobody ends them. resumes: the same command goes on where it was interrupted.
    """
    end_process(_status(main, resumes=resumes))


def check_first(check: Callable[[], object]) -> None:
    """Call `check()`; leave the process as `run_entry_point` does where it fails."""
    if status := _status(lambda: check() and None, resumes=False):
        end_process(status)


def _status(main: Callable[[], int | None], *, resumes: bool) -> int:
    rank = os.environ.get("RANK", "0")
    try:
        status = main() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        output = select.poll()
        output.register(1, 0)
        if not output.poll(0):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whoever read the output has left, as `head` does
        return 128 + signal.SIGPIPE
    except UserError as error:
        _report(f"error: {' '.join(str(error).split())}", rank)
        return 2
    except KeyboardInterrupt:
        if rank == "0":
            goes_on = "; the same command goes on from what is saved" if resumes else ""
            print(f"\nerror: interrupted{goes_on}", file=sys.stderr)  # below a progress bar
        return 130


def end_process(status: int = 0) -> NoReturn:
    """Exit; a member of torch's process group that has succeeded leaves without the interpreter's tear-down.

    DistributedDataParallel keeps the group's threads alive after the group is closed, and one that asks for the
    interpreter while it is torn down aborts a process that has done all its work. One that fails leaves by sys.exit:
    loggers that look there for its status hear of it.
    """
    distributed = sys.modules.get("torch.distributed")
    grouped = distributed is not None and distributed.is_available() and distributed.is_initialized()
    if status != 0 or not grouped:
        sys.exit(status)
    distributed.destroy_process_group()
    atexit._run_exitfuncs()  # loggers, temporary folders, worker processes
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _report(line: str, rank: str) -> None:
    if rank != "0":
        try:
            time.sleep(5)
        except KeyboardInterrupt:
            return
        line = f"[rank {rank}] {line}"
    print(line, file=sys.stderr)
