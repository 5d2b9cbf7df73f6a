"""What all commands share: settings from flags, and errors as one line."""

import atexit
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.cli.errors import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_SAVED,
    CommandError,
    Interrupted,
    print_error,
)
from experiments.cli.flags import Settings, parse
from experiments.cli.memory import keep_freed_memory, shortage


def run(
    main: Callable[[Settings], object],
    settings_type: type[Settings],
    name: str,
    recipes: Mapping[str, object] | None = None,
) -> None:
    """Calls `main` with settings read from the command line.

    A `CommandError` or `OSError`, or too little memory, ends the program with one line on standard
    error and exit code 1, a wrong flag likewise with 2, an interruption by the user with 130, or
    with 75 where a run was saved.

    Args:
        main: the command.
        settings_type: a dataclass; nested ones become groups of flags.
        name: the command's name in `python -m experiments.NAME`.
        recipes: as in `parse`.
    """
    keep_freed_memory()
    _handle_interrupts()
    try:
        main(parse(settings_type, name, recipes=recipes))
    except (CommandError, OSError) as error:
        print_error(error)
        sys.exit(EXIT_ERROR)
    except Interrupted as stop:
        if str(stop):
            print(stop, file=sys.stderr)
        sys.exit(EXIT_SAVED)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # nobody may read it
            print("interrupted", file=sys.stderr, flush=True)
            sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)  # threads that read images in C++ crash if Python ends first
    except Exception as error:
        told = shortage(error)
        if told is None:
            raise
        print_error(told)
        sys.exit(EXIT_ERROR)


def _handle_interrupts() -> None:
    """From here to the end Ctrl-C raises KeyboardInterrupt; then it ends the process at once."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        return
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # the package's, see there
        signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit.register(signal.signal, signal.SIGINT, signal.SIG_DFL)


def make_output(folder: Path) -> None:
    """Makes the folder of --output, before anything long begins.

    Raises:
        CommandError: if it is a file or cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(f"output={folder}: {error.strerror or error}") from error
