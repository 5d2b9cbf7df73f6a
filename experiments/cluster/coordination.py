"""The processes of a run that has several, on one machine or on many.

All of them do the same; where something is to happen once, process 0 does it alone.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from chansel_jax.training.devices import data_mesh
from chansel_jax.training.processes import gathered, is_loss, together
from experiments.cli.differences import differences
from experiments.cli.errors import EXIT_ERROR, CommandError, Interrupted, print_error
from experiments.cli.memory import shortage

Result = TypeVar("Result")

GRACE = 2  # seconds


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Within it an error of one process ends the others, instead of leaving them waiting for it.

    JAX's own way out would have each process wait for all, for minutes.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        _end(error)


@contextlib.contextmanager
def ended_at_once_by_others() -> Iterator[None]:
    """Within it the end of another process ends this one at once, with nothing left to be closed.

    For what waits for all processes when it is closed, as orbax does.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or not is_loss(error):
            raise
        _end(error)


def _end(error: Exception) -> NoReturn:
    """Ends this process without a word from JAX, which would have it wait for the others."""
    told = shortage(error)
    if told is None and is_loss(error):
        told = f"another process may have ended, it says why: {error}"
    print_error(told or error)
    time.sleep(GRACE)  # for the others to say what they have to: process 0 takes them with it
    os._exit(EXIT_ERROR)


def is_first() -> bool:
    """Whether this is process 0."""
    return jax.process_index() == 0


class _PatientConsole(Console):
    """Goes quiet when nobody reads what it prints, as of `| head`; a run is not to end for that."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # Python flushes the standard output once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def console() -> Console:
    """What is printed; only process 0 prints."""
    return _PatientConsole(highlight=False, soft_wrap=True, quiet=not is_first())


def first_alone(function: Callable[[], Result]) -> Result | None:
    """Calls `function` in process 0, while the others wait; they get None.

    Raises:
        OtherProcessError: in the other processes, if it failed.
        Exception: in process 0, what `function` raises.
    """
    return together(lambda: function() if is_first() else None)


def in_turn(function: Callable[[], Result]) -> Result:
    """What `function` returns, called in process 0 first, so that the others find its files.

    Raises:
        OtherProcessError: if it failed in others only.
        Exception: what `function` raises.
    """
    result = first_alone(function)
    return together(lambda: result if is_first() else function())


def check_equal(what: str, content: Mapping[str, Any]) -> None:
    """Checks that all processes have the same `content`, which is nested JSON.

    Raises:
        CommandError: in all of them, if not; it names all that differs.
    """
    text = json.dumps(content).encode()
    longest = int(gathered(len(text)).max())
    texts = gathered(np.frombuffer(text.ljust(longest), np.uint8))
    contents = [json.loads(bytes(found)) for found in texts]
    for process, other in enumerate(contents):
        if found := differences(contents[0], other):
            raise CommandError(
                f"process {process} has other {what} than process 0 ({'; '.join(found)})"
            )


def shared_maximum(number: Callable[[], int | None]) -> Callable[[], int | None]:
    """A function that tells all processes of the highest `number` of any, None being the least.

    All must call it as often. Where there are several it tells of what was there at the call
    before, so that none waits for the step that is running.
    """
    if jax.process_count() == 1:
        return number
    mesh = data_mesh()
    one_each = NamedSharding(mesh, PartitionSpec("data"))
    highest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def send():
        here = np.full(jax.local_device_count(), number() or 0, np.int32)
        return highest(jax.make_array_from_process_local_data(one_each, here))

    sent = send()

    def received():
        nonlocal sent
        arrived, sent = int(sent), send()
        return arrived or None

    return received
