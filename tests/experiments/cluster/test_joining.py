"""How processes come together, or do not."""

import signal
import socket
import subprocess
import sys

import pytest
from clusters import free_port

from experiments.cli.errors import CommandError
from experiments.cluster import joining
from experiments.cluster.joining import ClusterSettings


def test_processes_that_do_not_come_together_are_an_error(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(joining.jax.distributed, "initialize", fail)
    with pytest.raises(CommandError, match="come together: RuntimeError: DEADLINE_EXCEEDED"):
        joining.join(ClusterSettings("127.0.0.1:1", 2, 1))


def join_in_vain(process_id, address, patience=100, count=2):
    """A process that joins others, of which one does not come."""
    script = f"""
from experiments.cluster import joining
joining.SECONDS_UNTIL_TOLD, joining.SECONDS_UNTIL_GIVEN_UP = 0.2, {patience}
joining.join(joining.ClusterSettings({address!r}, {count}, {process_id}))
"""
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("process_id", "host", "waited_for"),
    [
        (0, "127.0.0.1", "the other processes"),
        (1, "127.0.0.1", "process 0 at --coordinator={address} ([Errno 111] Connection refused)"),
        (1, "no..host", "process 0 at --coordinator={address} (encoding with 'idna' codec failed"),
    ],
)
def test_it_is_told_what_is_waited_for_and_given_up(process_id, host, waited_for):
    address = f"{host}:{free_port()}"
    with join_in_vain(process_id, address, patience=1) as process:
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    waited_for = waited_for.format(address=address)
    assert f"this process waits for {waited_for}" in errors
    assert f"error: it gave up after waiting 1 s for {waited_for}" in errors


def test_those_who_came_wait_for_the_others():
    address = f"127.0.0.1:{free_port()}"
    with join_in_vain(0, address, count=3) as first, join_in_vain(1, address, count=3) as second:
        lines = [process.stderr.readline() for process in (first, second)]
        for process in (first, second):
            process.kill()
    # The second may have come before the first was there.
    assert lines[0] == "this process waits for the other processes\n"
    assert lines[1] in (
        lines[0],
        f"this process waits for process 0 at --coordinator={address} ([Errno 111] Connection refused)\n",
    )


def test_waiting_can_be_interrupted():
    with join_in_vain(1, f"127.0.0.1:{free_port()}") as process:
        assert process.stderr.readline().startswith("this process waits for process 0 at ")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT


def test_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CommandError, match=f"coordinator={address}: Address already in use"):
            joining.join(ClusterSettings(address, 2, 0))
