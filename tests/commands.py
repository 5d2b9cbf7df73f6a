"""Commands in processes of their own: one, or several on the loopback interface."""

import atexit
import contextlib
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

COMMANDS_IMPORT = ("experiments.parallelism.timing", "experiments.training.run")


@functools.cache
def _forking(modules: Sequence[str], path: str) -> socket.socket:
    """Asks tests/forked.py, which ends when nobody can ask it any more."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    script, descriptor = str(Path(__file__).with_name("forked.py")), theirs.fileno()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, script, str(descriptor), *modules],
            pass_fds=[descriptor],
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,
        )
    atexit.register(process.wait)
    atexit.register(ours.close)  # the last that is registered is the first that is called
    return ours


class Command(contextlib.AbstractContextManager):
    """A process that runs a module of `experiments`, or a script, with its flags.

    It has the attributes and methods of `subprocess.Popen`, whose pipes are of text.

    Args:
        words: the module's name or the script's path, and the flags.
        environment: its variables.
        new_session: whether signals to its process group are its own.
        pass_fds: the descriptors that stay open in it.
        imported: the modules that it finds imported.
    """

    def __init__(
        self,
        words: Sequence[str],
        environment: Mapping[str, str],
        new_session: bool = False,
        pass_fds: Sequence[int] = (),
        imported: Sequence[str] = COMMANDS_IMPORT,
    ):
        pipes = [os.pipe() for _ in range(3)]
        message = [[*map(str, words)], dict(environment), new_session, pass_fds]
        descriptors = [*(writing for _, writing in pipes), *pass_fds]
        forking = _forking(imported, environment["PYTHONPATH"])
        socket.send_fds(forking, [json.dumps(message).encode()], descriptors)
        for _, writing in pipes:
            os.close(writing)
        self.stdout, self.stderr, self._told = (os.fdopen(reading) for reading, _ in pipes)
        self.pid = int(self._told.readline())
        self.returncode = None

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], 0)[0]:
            self.returncode = int(self._told.readline())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None and not select.select([self._told], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("", timeout)
        return self.poll()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What it prints; that must have room in the pipes."""
        self.wait(timeout)
        return self.stdout.read(), self.stderr.read()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait(timeout=60)
        for pipe in (self.stdout, self.stderr, self._told):
            pipe.close()


def environment(devices: int) -> dict[str, str]:
    """Of a process with so many virtual devices."""
    virtual = f"--xla_force_host_platform_device_count={devices}"
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {virtual}",
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
    return ["experiments.train", *train_arguments(settings, workdir)]


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
) -> Iterator[list[Command]]:
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
            found.append(running.enter_context(Command([*command, *words], variables)))
        yield found
