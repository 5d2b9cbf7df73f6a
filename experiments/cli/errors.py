"""The errors of commands, and what is told of an error in one line."""

import os
import shutil
import traceback
from typing import Any

import jax

from chansel_jax.errors import OneLineError
from chansel_jax.training.processes import is_loss
from experiments.cli.flags import in_flags, refused_value


class CommandError(OneLineError):
    """A command cannot do what it was asked for."""


class Interrupted(Exception):
    """A run was asked to stop, and has saved; its message, if any, is one line: how to go on."""


def in_a_line(error: Exception, settings: Any) -> str | None:
    """What to tell of `error` in one line; None if it needs its traceback.

    Args:
        error: what ended the command.
        settings: the command's, of which the error may refuse a value.
    """
    if isinstance(error, shutil.Error) and isinstance(error.args[0], list):  # of several files
        _, target, reason = error.args[0][0]
        return f"{target}: {reason}"
    if isinstance(error, OneLineError | OSError):
        return in_flags(str(error), settings)
    if told := fault_of_machine(error):
        return told
    if "Unable to initialize backend" in str(error) or "Unknown backend" in str(error):
        return f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {str(error).splitlines()[0]}"
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object[error.start : error.end]!r} cannot be encoded: {error.reason}"
    if isinstance(error, AssertionError) and _is_of_platforms(error):
        return f"JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}: JAX finds no such devices here"
    return refused_value(error, settings) if isinstance(error, ValueError) else None


def _is_of_platforms(error: AssertionError) -> bool:
    """Whether JAX has found devices of none of the platforms that were asked for by name."""
    asked = os.environ.get("JAX_PLATFORMS")
    return bool(asked) and traceback.extract_tb(error.__traceback__)[-1].name == "backends"


def fault_of_machine(error: Exception) -> str | None:
    """What to tell of an error for want of memory, or of another process; None of others."""
    if told := shortage(error):
        return told
    if jax.distributed.is_initialized() and is_loss(error) and jax.process_count() > 1:
        return f"another process may have ended; it says why: {error}"
    return None


def shortage(error: Exception) -> str | None:
    """What to tell of an `error` that Python or XLA raised for want of memory; None of others."""
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return (
        f"there is too little memory ({error}): a smaller --batch-size takes less; so do, in "
        "training, --accumulate=N, which computes a batch in N parts, and --input=streaming, which "
        "leaves the images on disk"
    )
