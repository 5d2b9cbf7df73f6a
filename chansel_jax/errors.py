"""The base class of errors that are told in one line."""

from collections.abc import Sequence

MOST_LISTED = 20


class OneLineError(Exception):
    """Something outside the program went wrong; the message is one line, written for the user.

    What derives from it needs no traceback. Errors of the caller's are a `ValueError` or a
    `TypeError`, which name the argument and its value.
    """

    def __init__(self, message: object = ""):
        # Other libraries put line breaks into their messages, and some of those are quoted.
        super().__init__(in_one_line(str(message)))


def in_one_line(text: str) -> str:
    """`text` without line breaks; blanks within a line stay, they may be those of a name."""
    return " ".join(filter(None, map(str.strip, text.splitlines())))


def listed(things: Sequence[str], separator: str = ", ") -> str:
    """As many of `things` as a line can hold, and how many more there are."""
    left_out = len(things) - MOST_LISTED
    return separator.join(things[:MOST_LISTED]) + (f" and {left_out} more" if left_out > 0 else "")
