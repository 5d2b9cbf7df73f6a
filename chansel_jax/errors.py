"""The base class of errors that are told in one line."""


class OneLineError(Exception):
    """Something outside the program went wrong; the message is one line, written for the user.

    What derives from it needs no traceback. Errors of the caller's are a `ValueError` or a
    `TypeError`, which name the argument and its value.
    """

    def __init__(self, message: object = ""):
        # Other libraries put line breaks into their messages, and some of those are quoted.
        super().__init__(" ".join(str(message).split()))
