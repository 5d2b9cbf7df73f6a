"""What the processes of a run tell each other."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from chansel_jax.errors import OneLineError

Result = TypeVar("Result")


class OtherProcessError(OneLineError):
    """Another process of the run could not go on."""


def is_loss(error: Exception) -> bool:
    """Whether JAX raised `error` because a process that this one works with has ended.

    Or for another fault of what runs outside Python; nothing that is saved is to blame for it.
    """
    # What fails when it is begun, and not when it is waited for, comes as a ValueError.
    return isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, ValueError) and any(name in str(error) for name in ("Gloo", "NCCL"))
    )


def gathered(value: Any) -> np.ndarray:
    """The value of each process, in their order."""
    value = np.asarray(value)
    if jax.process_count() == 1:
        return value[None]
    return np.asarray(multihost_utils.process_allgather(value))


def together(function: Callable[[], Result]) -> Result:
    """What `function` returns in this process; if it fails in one of them, it fails in all.

    Raises:
        OtherProcessError: if it has failed in others only.
        Exception: what `function` raises.
    """
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        failure = error
    failed = np.flatnonzero(gathered(failure is not None))
    if failure is not None:
        raise failure
    if len(failed):
        raise OtherProcessError(f"process {failed[0]} could not go on; its own message says why")
    return result


def wait_for_all(what: str) -> None:
    """Waits until all processes have come to the same place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
