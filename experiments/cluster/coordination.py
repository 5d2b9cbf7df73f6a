"""The processes of a run that has several, on one machine or on many.

All of them do the same; where something is to happen once, process 0 does it alone.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from chansel_jax.training.devices import data_mesh
from chansel_jax.training.processes import gathered, is_loss, together
from experiments.cli.differences import differences
from experiments.cli.ending import EXIT_ERROR, end_before_others, print_error
from experiments.cli.errors import CommandError, fault_of_machine

Result = TypeVar("Result")


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
        print_error(fault_of_machine(error))
        end_before_others(EXIT_ERROR)


def is_first() -> bool:
    """Whether this is process 0."""
    return jax.process_index() == 0


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
