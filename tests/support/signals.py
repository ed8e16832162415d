"""A process that takes a second to end in order, and a signal for whoever started it."""

import os
import signal
import threading
import time
from pathlib import Path

CODE = """
import pathlib, signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
try:
    pathlib.Path({begun!r}).touch()
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(1)
    pathlib.Path({ended!r}).touch()
"""


def slow_to_end(folder: Path, number: signal.Signals) -> tuple[str, Path]:
    """Return Python code to run, and the file that it makes when it has ended in order. Once it runs, this process gets
    the signal, and nobody else."""
    begun, ended = folder / "begun", folder / "ended"

    def send() -> None:
        while not begun.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    return CODE.format(begun=str(begun), ended=str(ended)), ended
