"""The one exception that bad input to this package raises."""

from chansel_jax.errors import OneLineError


class DataError(OneLineError, ValueError):
    """Input that cannot be used."""
