"""What commands print to."""

import contextlib
import io
import sys
from collections.abc import Iterable, Sequence

import jax
from rich.console import Console
from rich.progress import track

from experiments.cli.ending import discard_output, say


class _PatientConsole(Console):
    """Goes quiet when it cannot print, as before `| head` or on a full disk.

    What is computed is written to its files all the same, and a run goes on.
    """

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError as error:
            say(f"note: nothing more is printed ({error.strerror or error})")
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        self.quiet = True
        discard_output()


def print_any_character() -> None:
    """Has the standard output write `\\u2013` and the like for what its encoding does not have.

    The standard error does so of itself.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        with contextlib.suppress(OSError):  # it was put in the place of a file of another kind
            sys.stdout.reconfigure(errors="backslashreplace")


def make_console() -> Console:
    """The console of a command; of several processes only process 0 prints.

    Names and paths are printed as they are: [brackets] and :colons: mean nothing in them.
    """
    return _PatientConsole(
        markup=False,
        emoji=False,
        highlight=False,
        soft_wrap=True,
        quiet=jax.process_index() != 0,
    )


def tracked(sequence: Sequence, description: str, console: Console) -> Iterable:
    """`sequence`, with a bar while it lasts, on a terminal alone."""
    hidden = not console.is_terminal
    return track(sequence, description, console=console, transient=True, disable=hidden)
