"""The one exception that bad input to this package raises."""


class DataError(ValueError):
    """Input that cannot be used; the message is one line, written for the user."""

    def __init__(self, message: str):
        # Libraries put line breaks into their messages, and some of those are quoted here.
        super().__init__(" ".join(message.split()))
