"""Signals that ask a run to stop, noted so that it can save first."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def noted_signals() -> Iterator[Callable[[], signal.Signals | None]]:
    """Within it the first SIGINT or SIGTERM is noted only; a second one ends the process at once.

    Yields:
        A function that returns the signal that has come, or None.
    """
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # signals are the main thread's
        return

    def note(number, _):
        received.append(signal.Signals(number))
        for other in SIGNALS:
            signal.signal(other, signal.SIG_DFL)

    # One that was not set in Python (JAX's own, in a run of several processes) is None.
    before = {number: signal.signal(number, note) or signal.SIG_DFL for number in SIGNALS}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
