"""Signals that ask a run to stop, noted so that it can save first."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator

# The last is of a terminal that is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def noted_signals(
    say: Callable[[str], None],
) -> Iterator[Callable[[], signal.Signals | None]]:
    """Within it the first of SIGNALS is noted only; a second one ends the process at once.

    The exit code is then 128 and the signal's number, as a shell tells it. A signal that is ignored
    (as SIGINT is by what a script runs in the background, SIGHUP by `nohup`) stays ignored.

    Args:
        say: takes a line when the first has come; it is called in another thread.

    Yields:
        A function that returns the signal that has come, or None.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # signals are the main thread's
        return
    received = []
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]

    def note(number, _):
        received.append(signal.Signals(number))

    with _ended_by_the_second_of(heeded, say):
        # One that was not set in Python (JAX's own, in a run of several processes) is None.
        before = {number: signal.signal(number, note) or signal.SIG_DFL for number in heeded}
        try:
            yield lambda: received[0] if received else None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _ended_by_the_second_of(numbers: Collection[int], say: Callable[[str], None]) -> Iterator[None]:
    """Within it a thread says that one of these signals has come, and ends the process at a second.

    A handler would have to wait for what the main thread does: a compilation may take minutes.
    """
    reading, writing = socket.socketpair()
    writing.setblocking(False)

    def count():
        seen = 0
        while byte := reading.recv(1):
            (number,) = byte
            if number not in numbers:
                continue
            seen += 1
            if seen == 2:
                os._exit(128 + number)
            name = signal.Signals(number).name
            line = f"{name}: stops between two steps, and saves; a second one ends it at once"
            # In another thread again, for the next signal not to wait until somebody reads it.
            threading.Thread(target=say, args=(line,), daemon=True).start()

    before = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=count, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        writing.close()
        thread.join()
        reading.close()
