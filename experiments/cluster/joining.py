"""How the processes of a run come together."""

import contextlib
import dataclasses
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import jax

from experiments.cli.errors import EXIT_ERROR, CommandError, print_error

SECONDS_UNTIL_TOLD = 5
SECONDS_UNTIL_GIVEN_UP = 300
HEARTBEAT_TIMEOUT = 30  # seconds


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
        found = re.fullmatch(r".+:[0-9]{1,5}", self.coordinator)
        if not found or not 0 < self.address[1] < 2**16:
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

    @property
    def address(self) -> tuple[str, int]:
        """The coordinator's host and port."""
        host, _, port = self.coordinator.rpartition(":")
        return host, int(port)


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
        _check_port_is_free(settings)
    try:
        with _waiting_told(settings), _interrupt_ends_process():
            jax.distributed.initialize(
                settings.coordinator,
                settings.num_processes,
                settings.process_id,
                # Its own end of patience comes with a trace of C++.
                initialization_timeout=2 * SECONDS_UNTIL_GIVEN_UP,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
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


def _check_port_is_free(settings: ClusterSettings) -> None:
    """Raises `CommandError` if not; JAX would crash."""
    try:
        with socket.create_server(("", settings.address[1])):
            pass
    except OSError as error:
        raise CommandError(
            f"coordinator={settings.coordinator}: {error.strerror or error}"
        ) from error


@contextlib.contextmanager
def _waiting_told(settings: ClusterSettings) -> Iterator[None]:
    """Within it a thread tells what is waited for if that takes long, and ends it at last."""
    over = threading.Event()

    def tell():
        if over.wait(SECONDS_UNTIL_TOLD):
            return
        with contextlib.suppress(OSError):  # nobody may read it
            print(f"waiting for {_awaited(settings)}", file=sys.stderr, flush=True)
        if over.wait(SECONDS_UNTIL_GIVEN_UP):
            return
        with contextlib.suppress(OSError):
            print_error(
                f"gave up after {SECONDS_UNTIL_GIVEN_UP} s of waiting for {_awaited(settings)}"
            )
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
    host, port = settings.address
    try:
        with socket.create_connection((host.strip("[]"), port), timeout=SECONDS_UNTIL_TOLD):
            return "the other processes"
    except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
        return f"process 0 at --coordinator={settings.coordinator} ({error})"


@contextlib.contextmanager
def _interrupt_ends_process() -> Iterator[None]:
    """Within it Ctrl-C ends the process also where Python's own handler does not get its turn."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
