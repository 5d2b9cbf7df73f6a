"""How processes come together, or do not."""

import signal
import socket
import subprocess
import sys

import pytest
from clusters import free_port

from experiments import joining
from experiments.command_line import CommandError
from experiments.joining import ClusterSettings


def test_processes_that_do_not_come_together_are_an_error(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out")

    monkeypatch.setattr(joining.jax.distributed, "initialize", fail)
    with pytest.raises(CommandError, match="come together: RuntimeError: DEADLINE_EXCEEDED"):
        joining.join(ClusterSettings("127.0.0.1:1", 2, 1))


def join_alone(process_id, port, patience):
    """A process of two that joins the other, which does not come."""
    script = f"""
from experiments import joining
joining.UNTIL_TOLD, joining.PATIENCE = 0.2, {patience}
joining.join(joining.ClusterSettings("127.0.0.1:{port}", 2, {process_id}))
"""
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


WAITED_FOR = {
    0: "the other processes",
    1: "process 0 at --coordinator=127.0.0.1:{port} (Connection refused)",
}


@pytest.mark.parametrize("process_id", WAITED_FOR)
def test_it_is_told_what_is_waited_for_and_given_up(process_id):
    port = free_port()
    waited_for = WAITED_FOR[process_id].format(port=port)
    with join_alone(process_id, port, patience=1) as process:
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert (
        errors
        == f"waiting for {waited_for}\nerror: gave up after 1 s of waiting for {waited_for}\n"
    )


def test_waiting_can_be_interrupted():
    with join_alone(1, free_port(), patience=100) as process:
        assert process.stderr.readline().startswith("waiting for process 0 at ")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT


def test_port_that_is_taken():
    with socket.create_server(("", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CommandError, match=f"coordinator={address}: Address already in use"):
            joining.join(ClusterSettings(address, 2, 0))
