"""How a command ends: its errors as one line, and its exit codes."""

import sys

EXIT_ERROR = 1


EXIT_USAGE = 2


EXIT_SAVED = 75  # "try again later" in BSD's sysexits.h


EXIT_INTERRUPTED = 130


class CommandError(Exception):
    """What the user can mend; its message is one line."""


class Interrupted(Exception):
    """A run was asked to stop, and has saved; its message, if any, is one line: how to go on."""


def print_error(error: Exception | str) -> None:
    """Prints an error as one line, at once."""
    print("error:", " ".join(str(error).split()), file=sys.stderr, flush=True)
