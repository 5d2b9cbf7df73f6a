"""How processes come together, or do not."""

import signal
import socket
import subprocess
import sys

import pytest
from commands import free_port

from experiments.cli.errors import CommandError
from experiments.cluster import joining
from experiments.cluster.joining import ClusterSettings


def test_processes_that_do_not_come_together_are_an_error(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(joining.jax.distributed, "initialize", fail)
    with pytest.raises(CommandError, match="come together: RuntimeError: DEADLINE_EXCEEDED"):
        joining.join(ClusterSettings("127.0.0.1:1", 2, 1))


def join_in_vain(address, patience=100):
    """A process that joins another, which does not come."""
    script = f"""
from experiments.cluster import joining
joining.SECONDS_UNTIL_TOLD, joining.SECONDS_UNTIL_GIVEN_UP = 0.2, {patience}
joining.join(joining.ClusterSettings({address!r}, 2, 1))
"""
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


def test_it_is_told_what_is_waited_for_and_given_up():
    address = f"127.0.0.1:{free_port()}"
    with join_in_vain(address, patience=1) as process:
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    awaited = f"process 0 at --coordinator={address} ([Errno 111] Connection refused)"
    assert f"this process waits for {awaited}\n" in errors
    assert f"error: it gave up after waiting 1 s for {awaited}\n" in errors


def test_those_who_can_be_reached_are_waited_for():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        for settings in (
            ClusterSettings(address, 2, 0),
            ClusterSettings(address, 3, 2),
            ClusterSettings(),
        ):
            assert joining._awaited(settings) == "the other processes"
    awaited = joining._awaited(ClusterSettings("no..host:1", 2, 1))
    assert awaited.startswith("process 0 at --coordinator=no..host:1 (")
    assert "label empty" in awaited  # among words that differ between versions of Python


def test_waiting_can_be_interrupted():
    with join_in_vain(f"127.0.0.1:{free_port()}") as process:
        assert process.stderr.readline().startswith("this process waits for process 0 at ")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT


def test_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CommandError, match=f"coordinator={address}: Address already in use"):
            joining.join(ClusterSettings(address, 2, 0))
