"""Signals, in processes of their own."""

import signal
import subprocess
import sys
import threading

import pytest

from experiments.cli.ending import noted_signals

SCRIPT = """
import hashlib, signal, sys, time
from experiments.cli.ending import noted_signals
with noted_signals(lambda line: SAY) as received:
    print(received(), flush=True)
    while received() is None:
        time.sleep(0.01)
    print(received().name, flush=True)
    WAIT
"""
# While Python runs, and while it waits for a function in C, which signals do not interrupt.
SAY = "print(line, file=sys.stderr, flush=True)"
WAITS = ("while True: pass", "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)")


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_noted_and_the_second_ends_the_process(first, second, wait):
    command = [sys.executable, "-c", SCRIPT.replace("WAIT", wait).replace("SAY", SAY)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as process:
        assert process.stdout.readline() == "None\n"
        process.send_signal(first)
        assert process.stdout.readline() == f"{first.name}\n"
        assert process.stderr.readline().startswith(f"{first.name}: the run stops between")
        process.send_signal(second)
        assert process.wait(timeout=10) == 128 + second


# As where nobody reads it, and as Rich where nobody can.
@pytest.mark.parametrize("say", ["time.sleep(1000)", "sys.exit(1)"])
def test_second_signal_does_not_depend_on_what_is_said_of_the_first(say):
    command = [sys.executable, "-c", SCRIPT.replace("WAIT", WAITS[0]).replace("SAY", say)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "None\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "SIGTERM\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 128 + signal.SIGTERM


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with noted_signals(print) as received:
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert received() is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone():
    found = []

    def target():
        with noted_signals(print) as received:
            found.append(received())

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    assert found == [None] and signal.getsignal(signal.SIGTERM) is before
