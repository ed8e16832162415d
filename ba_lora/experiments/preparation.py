"""What a table needs before its own runs (`prepare` in its file): each a module with its words, run on this machine."""

import subprocess
import sys
from collections.abc import Sequence

from ba_lora.errors import INCOMPLETE, UserError
from ba_lora.experiments.executors import find_executor
from ba_lora.experiments.options import GridOptions
from ba_lora.paths import PROJECT_ROOT, stage_environment

GRID_MODULE = "ba_lora.experiments.grid"


def prepare_words(call: Sequence[str], options: GridOptions) -> list[str]:
    """Return what a table needs first, with the words that say how: another table is filled as this one is.

    Raises UserError where the call is no table's, which always runs here, and the runs would not.
    """
    if call[0] == GRID_MODULE:
        return [*call, *options.running]
    executor, _ = find_executor(options.executor, options.executor_settings)
    if not executor.on_this_machine:
        raise UserError(
            f"executor={options.executor}: the table needs python -m {' '.join(call)}, which runs on this machine "
            "only: give the whole command with executor=local, on a node that may work"
        )
    return [*call, *([f"workers={options.workers}"] if options.workers else [])]


def prepare(words: Sequence[str]) -> None:
    """Run what a table needs first. Raises UserError where it fails; it has said why."""
    print(f"first: python -m {' '.join(words)}", flush=True)
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=PROJECT_ROOT,
        env=stage_environment(),
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # only the grid gets Ctrl-C, and passes it on once
    )
    try:
        status = process.wait()
    except KeyboardInterrupt:
        process.terminate()  # SIGINT is ignored below a script's `… &`; what is called ends in order by both
        process.wait()
        raise
    allowed = (0, INCOMPLETE) if words[0] == GRID_MODULE else (0,)  # the page of another table may lack something
    if status not in allowed:
        raise UserError(f"python -m {' '.join(words)} failed with exit status {status}; see above")
