"""The processes of a run that has several, on one machine or on many.

All of them do the same; where something is to happen once, process 0 does it alone.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from chansel_jax.processes import OtherProcessError, gathered, together
from chansel_jax.training import data_mesh
from experiments.command_line import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    CommandError,
    Interrupted,
    print_error,
)
from experiments.memory import is_exhausted

Result = TypeVar("Result")

# Seconds.
GRACE = 2
UNTIL_TOLD = 5  # what is waited for
PATIENCE = 300
WITHOUT_SIGN_OF_LIFE = 30  # until a process counts as dead


@dataclasses.dataclass(frozen=True)
class ClusterSettings:
    """The processes, where Slurm, Open MPI, Kubernetes or Cloud TPU do not announce them."""

    coordinator: str | None = None
    """HOST:PORT at which all reach process 0; the port is any that is free there."""
    num_processes: int | None = None
    """How many there are."""
    process_id: int | None = None
    """Which of them this one is, from 0."""

    def __post_init__(self):
        values = dataclasses.asdict(self)
        missing = [name for name, value in values.items() if value is None]
        if 0 < len(missing) < len(values):
            raise ValueError(f"{missing[0]}=None: it goes with the others of {', '.join(values)}")
        if missing:
            return
        port = self.coordinator.rpartition(":")[2]
        if not re.fullmatch(r".+:[0-9]{1,5}", self.coordinator) or not 0 < int(port) < 2**16:
            raise ValueError(
                f"coordinator={self.coordinator} must be HOST:PORT, a port being from 1 to 65535"
            )
        if self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes} must be at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id={self.process_id} must be in [0, {self.num_processes}), "
                "num_processes being the upper end"
            )


def join(settings: ClusterSettings) -> None:
    """Joins the processes that `settings` name or else the environment announces, if it does.

    It comes before anything else that JAX does. Each process waits here for all the others; what
    for is told after a while, and in the end that ends it.

    Raises:
        CommandError: if they do not come together.
    """
    # JAX's own handler of SIGTERM would keep a process from ending wherever we do not look for it.
    jax.config.update("jax_enable_preemption_service", False)
    if settings.process_id == 0:
        _check_port_is_free(settings.coordinator)
    try:
        with _waiting_told(settings), _default_interrupt():
            jax.distributed.initialize(
                settings.coordinator,
                settings.num_processes,
                settings.process_id,
                # Its own end of patience comes with a trace of C++.
                initialization_timeout=2 * PATIENCE,
                heartbeat_timeout_seconds=WITHOUT_SIGN_OF_LIFE,
            )
    except Exception as error:  # each kind of cluster has its own
        announced = settings.coordinator or "JAX_COORDINATOR_ADDRESS" in os.environ
        # What JAX raises where neither the arguments nor the environment say anything.
        if isinstance(error, ValueError) and not announced and "coordinator_address" in str(error):
            return
        raise CommandError(
            f"the processes did not come together: {type(error).__name__}: {error} (for a single "
            "one: --coordinator=127.0.0.1:PORT --num-processes=1 --process-id=0)"
        ) from error


def _check_port_is_free(coordinator: str) -> None:
    """Raises `CommandError` if not; JAX would crash."""
    try:
        with socket.create_server(("", int(coordinator.rpartition(":")[2]))):
            pass
    except OSError as error:
        raise CommandError(f"coordinator={coordinator}: {error.strerror or error}") from error


@contextlib.contextmanager
def _waiting_told(settings: ClusterSettings) -> Iterator[None]:
    """Within it a thread tells what is waited for if that takes long, and ends it at last."""
    over = threading.Event()

    def tell():
        if over.wait(UNTIL_TOLD):
            return
        print(f"waiting for {_awaited(settings)}", file=sys.stderr, flush=True)
        if over.wait(PATIENCE):
            return
        print_error(f"gave up after {PATIENCE} s of waiting for {_awaited(settings)}")
        os._exit(EXIT_ERROR)

    threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _awaited(settings: ClusterSettings) -> str:
    """Whom this process waits for, and why they cannot be reached, as far as can be known."""
    if not settings.process_id:  # it listens, or the environment knows
        return "the other processes"
    host, _, port = settings.coordinator.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=UNTIL_TOLD):
            return "others than process 0, which is there"
    except OSError as error:
        return f"process 0 at --coordinator={settings.coordinator} ({error.strerror or error})"


@contextlib.contextmanager
def _default_interrupt() -> Iterator[None]:
    """Within it Ctrl-C ends the process also where Python's own handler does not get its turn."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Within it an error of one process ends the others, instead of leaving them waiting for it.

    JAX's own way out would have each process wait for all, for minutes.
    """
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        if jax.process_count() == 1:
            raise
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(EXIT_INTERRUPTED)
    except Exception as error:
        if jax.process_count() == 1:
            raise
        _end(error)


@contextlib.contextmanager
def ended_by_others() -> Iterator[None]:
    """Within it the end of another process ends this one at once, with nothing left to be closed.

    For what waits for all processes when it is closed, as orbax does.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        _end(error)


def _end(error: Exception) -> NoReturn:
    if isinstance(error, jax.errors.JaxRuntimeError) and not is_exhausted(error):
        error = OtherProcessError(f"another process may have ended, it says why: {error}")
    print_error(error)
    time.sleep(GRACE)  # for the others to say what they have to: process 0 takes them with it
    os._exit(EXIT_ERROR)


def is_first() -> bool:
    """Whether this is process 0."""
    return jax.process_index() == 0


def console() -> Console:
    """What is printed; only process 0 prints."""
    return Console(highlight=False, soft_wrap=True, quiet=not is_first())


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
        CommandError: in all of them, if not.
    """
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    digests = gathered(np.frombuffer(digest, np.uint8))
    for process, other in enumerate(digests):
        if not np.array_equal(other, digests[0]):
            raise CommandError(f"process {process} has other {what} than process 0")


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
