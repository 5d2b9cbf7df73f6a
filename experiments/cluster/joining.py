"""How the processes of a run come together."""

import dataclasses
import re
import socket
import threading

import jax

from experiments.cli.ending import (
    EXIT_ERROR,
    end_at_once,
    interrupts_end_process,
    print_error,
    say,
)
from experiments.cli.errors import CommandError

SECONDS_UNTIL_TOLD = 5
SECONDS_UNTIL_GIVEN_UP = 300
HEARTBEAT_TIMEOUT = 30  # seconds


@dataclasses.dataclass(frozen=True)
class ClusterSettings:
    """The processes, where Slurm, Open MPI, Kubernetes or Cloud TPU do not announce them."""

    coordinator: str | None = None
    """HOST:PORT at which all processes reach process 0; the port may be any that is free there."""
    num_processes: int | None = None
    """How many processes there are."""
    process_id: int | None = None
    """Which of them this process is, from 0."""

    def __post_init__(self):
        given = {name: value for name, value in vars(self).items() if value is not None}
        if not given:
            return
        if len(given) < len(dataclasses.fields(self)):
            name, value = next(iter(given.items()))
            raise ValueError(
                f"{name}={value} needs all of --coordinator, --num-processes and --process-id"
            )
        found = re.fullmatch(r".+:[0-9]{1,5}", self.coordinator)
        if not found or not 0 < self.address[1] < 2**16:
            raise ValueError(
                f"coordinator={self.coordinator} must be HOST:PORT, a port being from 1 to 65535"
            )
        if self.num_processes < 1:
            raise ValueError(f"num_processes={self.num_processes} must be at least 1")
        if not 0 <= self.process_id < self.num_processes:
            raise ValueError(
                f"process_id={self.process_id} must be from 0 to {self.num_processes - 1}, one "
                f"less than num_processes={self.num_processes}"
            )

    @property
    def address(self) -> tuple[str, int]:
        """The coordinator's host and port."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def join(settings: ClusterSettings) -> None:
    """Joins the processes that `settings` name or else the environment announces, if it does.

    It comes before anything else that JAX does. Each process waits here for all the others; after a
    while it says for whom, and in the end it gives up, and the process ends.

    Raises:
        CommandError: if the processes do not come together.
    """
    # JAX's own handler of SIGTERM would keep a process from ending wherever we do not look for it.
    jax.config.update("jax_enable_preemption_service", False)
    if settings.process_id == 0:
        try:  # where the port is taken, JAX would crash
            socket.create_server(("", settings.address[1])).close()
        except OSError as error:
            reason = error.strerror or error
            raise CommandError(f"coordinator={settings.coordinator}: {reason}") from error
    joined = threading.Event()
    threading.Thread(target=_tell_and_give_up, args=(settings, joined), daemon=True).start()
    try:
        with interrupts_end_process():  # JAX waits in C++, where Python's handler gets no turn
            jax.distributed.initialize(
                *dataclasses.astuple(settings),
                # Its own end of patience comes with a trace of C++.
                initialization_timeout=2 * SECONDS_UNTIL_GIVEN_UP,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            )
    except Exception as error:  # each kind of cluster has its own
        if str(error).startswith("coordinator_address "):  # nothing announces other processes
            return
        raise CommandError(
            f"the processes did not come together: {type(error).__name__}: {error} (for a single "
            "one: --coordinator=127.0.0.1:PORT --num-processes=1 --process-id=0)"
        ) from error
    finally:
        joined.set()


def _tell_and_give_up(settings: ClusterSettings, joined: threading.Event) -> None:
    """Says what the process waits for if that takes long, and ends the process at last."""
    if joined.wait(SECONDS_UNTIL_TOLD):
        return
    say(f"this process waits for {_awaited(settings)}")
    if not joined.wait(SECONDS_UNTIL_GIVEN_UP):
        awaited = _awaited(settings)
        print_error(f"it gave up after waiting {SECONDS_UNTIL_GIVEN_UP} s for {awaited}")
        end_at_once(EXIT_ERROR)


def _awaited(settings: ClusterSettings) -> str:
    """Whom this process waits for, and why they cannot be reached, as far as can be known."""
    if settings.process_id:  # else it listens, or only the environment knows
        try:
            socket.create_connection(settings.address, timeout=SECONDS_UNTIL_TOLD).close()
        except (OSError, UnicodeError) as error:  # the latter where the name cannot be one
            return f"process 0 at --coordinator={settings.coordinator} ({error})"
    return "the other processes"
