"""A limit on the processor time of one call, so that a single item can never hang a whole scoring."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class TimeLimit(BaseException):
    """The time is up. Not an Exception, so that handlers on the way let it pass."""


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimit in the body once this process has used that much processor time; its load does not count.

    Works in the main thread, where signals arrive (regexes look for them too); elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(signum: int, frame: object) -> None:
        raise TimeLimit

    before = signal.signal(signal.SIGPROF, ring)
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds, 0.2)  # again, should a bare `except:` swallow one
        yield
    finally:
        while True:
            with contextlib.suppress(TimeLimit):
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.signal(signal.SIGPROF, before)
                break
