"""How the process of a command ends: its exit codes, its last words, and signals."""

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import NoReturn

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_SAVED = 75  # "try again later" in BSD's sysexits.h
EXIT_INTERRUPTED = 130

# The last is sent when a terminal is closed.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

GRACE = 2  # seconds


def say(line: str) -> None:
    """Prints a line on the standard error at once, or does nothing if nobody can read it."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def discard_output() -> None:
    """From here to the end nothing reaches the standard output, which nobody reads."""
    # Python flushes it once more at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: Exception | str) -> None:
    """Prints an error as one line, at once."""
    # The package brings JAX, for which no signal is to wait.
    from chansel_jax.errors import in_one_line

    say(f"error: {in_one_line(str(error))}")


def end_at_once(code: int) -> NoReturn:
    """Ends the process: nothing is closed, and no thread or other process is waited for.

    Threads that read images in C++ crash if Python ends before them, and JAX's own way out has each
    process of a run wait for all the others, for minutes.
    """
    os._exit(code)


def end_before_others(code: int) -> NoReturn:
    """Ends the process as `end_at_once` does, and with process 0 the others of its run.

    They are left the time to say what they have to.
    """
    time.sleep(GRACE)
    end_at_once(code)


def handle_interrupts() -> None:
    """From here to the end Ctrl-C raises KeyboardInterrupt; then it ends the process at once."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # the package has set it, see there
        signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def interrupts_end_process() -> Iterator[None]:
    """Within it Ctrl-C ends the process at once, also where Python's handler gets no turn."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


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
                end_at_once(128 + number)
            name = signal.Signals(number).name
            line = f"{name}: the run stops between two steps, and saves; a second one ends it now"
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
