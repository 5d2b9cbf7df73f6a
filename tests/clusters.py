"""Commands in processes of their own: one, or several on the loopback interface."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

WITHOUT_TORCH = str(Path(__file__).parent / "without_torch")


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many virtual devices."""
    virtual = f"--xla_force_host_platform_device_count={devices}"
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {virtual}",
        # tensorboardX imports PyTorch where that is installed, for seconds.
        "PYTHONPATH": os.pathsep.join([WITHOUT_TORCH, os.environ.get("PYTHONPATH", "")]),
    }


def train_arguments(settings, workdir) -> list[str]:
    """The flags for the run that the fixture `settings` describes, in another folder."""
    return [
        *("--dataset=folder", f"--data-dir={settings.data.data_dir}", "--blocks=1", "--width=4"),
        *("--learning-rate=0.01", "--warmup-fraction=0.2", "--batch-size=16", "--epochs=3"),
        f"--workdir={workdir}",
    ]


def train_command(settings, workdir) -> list[str]:
    """That run in a process of its own."""
    return [sys.executable, "-m", "experiments.train", *train_arguments(settings, workdir)]


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
