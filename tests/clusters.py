"""Several processes of one command, on the loopback interface."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many virtual devices."""
    virtual = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {virtual}"}


def free_port() -> int:
    """One that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@contextlib.contextmanager
def processes(
    command: Sequence[str],
    count: int,
    devices: int,
    *,
    last: Sequence[str] = (),
    last_environment: Mapping[str, str] | None = None,
) -> Iterator[list[subprocess.Popen]]:
    """`count` processes of `command` with `devices` in all.

    The arguments in `last`, and `last_environment`, are the last process's alone.
    """
    port = free_port()
    with contextlib.ExitStack() as running:
        found = []
        for i in range(count):
            words = [f"--coordinator=127.0.0.1:{port}", f"--num-processes={count}"]
            words += [f"--process-id={i}"]
            variables = environment(devices // count)
            if i == count - 1:
                words += last
                variables |= last_environment or {}
            process = subprocess.Popen(
                [*command, *words],
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            found.append(running.enter_context(process))
            running.callback(process.kill)
        yield found
