"""Runs of several processes, on the loopback interface."""

import dataclasses
import io
import json
import os
import re
import shutil
import signal

import pytest
from commands import processes, train_command
from rich.console import Console

from experiments.cli.ending import EXIT_INTERRUPTED, EXIT_SAVED
from experiments.cluster import coordination, joining
from experiments.training.experiment import load_data
from experiments.training.run import train_and_evaluate

DEVICES = 4


def test_one_process_is_the_first_and_waits_for_none():
    assert coordination.is_first()
    assert coordination.first_alone(lambda: 1) == coordination.in_turn(lambda: 1) == 1
    with pytest.raises(KeyError):
        coordination.first_alone({}.popitem)
    coordination.check_equal("settings", {"epochs": 1})
    numbers = iter([None, 15])
    assert [coordination.shared_maximum(lambda: next(numbers))() for _ in range(2)] == [None, 15]


def two_processes(settings, workdir, *words, devices=DEVICES, **of_the_last):
    """Of a run over so many devices in all."""
    return processes([*train_command(settings, workdir), *words], 2, devices, **of_the_last)


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_losses(workdir, other):
    for row, expected in zip(rows(workdir), rows(other), strict=True):
        assert row["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-5)
        # With running statistics, which add up rounding errors from the first step on.
        assert row["val_loss"] == pytest.approx(expected["val_loss"], abs=3e-4)


def take_back_an_epoch(workdir):
    shutil.rmtree(workdir / "checkpoints" / "3")
    (workdir / "summary.json").unlink()


def test_two_processes_go_on_with_a_run_and_one_ends_it_with_the_same_losses(
    settings, whole, tmp_path
):
    """The two are told to stop, of which one tells the other, while they compile."""
    workdir = tmp_path / "run"
    shutil.copytree(settings.workdir, workdir)
    take_back_an_epoch(workdir)
    with two_processes(settings, workdir, "--input=streaming", "--workers=0") as both:
        printed = ""
        while "resumed after epoch 2 of 3" not in printed:
            assert both[0].poll() is None
            printed += both[0].stdout.readline()
        both[1].send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [EXIT_SAVED] * 2
    assert f"{DEVICES} × cpu" in printed and "2 × cpu" not in printed
    assert re.search(r"stopped by SIGTERM after step \d+ of 11 of epoch 3", outputs[0][1])
    assert "stopped" not in outputs[1][1] and "epoch" not in outputs[1][0]  # one speaks
    console = Console(file=io.StringIO(), width=120)
    train_and_evaluate(dataclasses.replace(settings, workdir=workdir), console)
    assert "of epoch 3" in console.file.getvalue()
    assert_same_losses(workdir, settings.workdir)


def test_processes_that_differ_are_told(settings, tmp_path):
    last = ["--seed=1", "--input=streaming"]
    with two_processes(settings, tmp_path / "run", devices=2, last=last) as both:
        outputs = [process.communicate(timeout=300) for process in both]
    for process, (_, errors) in zip(both, outputs, strict=True):
        assert process.returncode == 1
        differing = "input: memory → streaming; seed: 0 → 1"
        assert f"error: process 1 has other settings than process 0 ({differing})" in errors
    assert not (tmp_path / "run").exists()


def test_processes_must_agree_on_the_folder_and_its_checkpoints(
    settings, whole, tmp_path, monkeypatch
):
    """On machines that share none, process 0 alone has made its folder; or they hold other runs."""

    def compared(workdir, first):
        """What a process with that folder tells the others."""
        told = {}
        with monkeypatch.context() as patch:
            patch.setattr(coordination, "is_first", lambda: first)
            patch.setattr(coordination, "check_equal", told.__setitem__)
            given = dataclasses.replace(settings, workdir=workdir)
            train_and_evaluate(given, Console(quiet=True))
        return told

    shutil.copytree(settings.workdir, tmp_path / "whole")
    shutil.copytree(settings.workdir, tmp_path / "part")
    take_back_an_epoch(tmp_path / "part")
    files, checkpoints = (
        f"{what} in its --workdir, which all must share," for what in ("files", "checkpoints")
    )
    told = compared(tmp_path / "whole", True)
    assert told[files] == {"config": True} and told[checkpoints] == {"checkpoints": [[2, 3], []]}
    assert compared(tmp_path / "part", True)[checkpoints] == {"checkpoints": [[2], []]}
    assert compared(tmp_path / "none", False)[files] == {"config": False}


def test_failure_of_another_process_ends_the_first(settings, tmp_path):
    with two_processes(
        settings, tmp_path / "run", last=[f"--data-dir={tmp_path / 'none'}"]
    ) as both:
        outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert "error: process 1 could not go on; its own message says why" in outputs[0][1]
    assert f"--data-dir={tmp_path / 'none'} is no folder" in outputs[1][1]


def test_process_that_fails_while_it_trains_ends_the_others(settings, tmp_path, monkeypatch):
    """It cannot read its images: the other waits for it in a sum over devices."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    monkeypatch.setenv("TFDS_DATA_DIR", str(good))
    load_data(settings.data, in_memory=False)
    shutil.copytree(good, bad)
    (path,) = bad.rglob("*train.array_record*")
    os.truncate(path, path.stat().st_size // 2)
    words = ("--input=streaming", "--workers=0")
    last = {"TFDS_DATA_DIR": str(bad)}
    run = two_processes(settings, tmp_path / "run", *words, devices=2, last_environment=last)
    with run as both:
        outputs = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert "cannot be read" in outputs[1][1]
    assert "error: another process may have ended" in outputs[0][1]


def end_of_the_other(settings, workdir, killed):
    """The exit code and errors of one process of a training whose other one is killed."""
    with two_processes(settings, workdir, "--epochs=100", devices=2) as both:
        while not both[0].stdout.readline().startswith("epoch"):
            assert both[0].poll() is None
        both[killed].kill()
        other = both[1 - killed]
        _, errors = other.communicate(timeout=joining.HEARTBEAT_TIMEOUT / 2)
    return other.returncode, errors


def test_process_that_is_killed_ends_the_first(settings, tmp_path):
    code, errors = end_of_the_other(settings, tmp_path / "run", killed=1)
    assert code == 1
    assert "error: another process may have ended" in errors and "cannot save" not in errors


def test_first_process_that_is_killed_ends_the_others(settings, tmp_path):
    """By JAX, whose service is in that process."""
    code, _ = end_of_the_other(settings, tmp_path / "run", killed=0)
    assert code != 0


def test_failure_of_the_first_process_ends_the_others(settings, tmp_path):
    (tmp_path / "file").touch()
    with two_processes(settings, tmp_path / "file" / "run") as both:
        outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [1, 1]
    assert "cannot write to --workdir" in outputs[0][1]
    assert "process 0 could not go on" in outputs[1][1]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, EXIT_INTERRUPTED)]
)
def test_signal_where_nothing_is_to_be_saved_ends_all_processes(tmp_path, number, code):
    command = ["experiments.scaling", "--blocks=1", "--batch-size=2"]
    command += ["--rounds=100000", f"--output={tmp_path / 'report'}"]
    with processes(command, count=2, devices=2) as both:
        while "virtual devices" not in both[0].stdout.readline():
            assert both[0].poll() is None
        both[1].send_signal(number)
        outputs = [process.communicate(timeout=100) for process in both]
    assert both[1].returncode == code and both[0].returncode != 0
    assert outputs[1][1].endswith("interrupted\n" if number == signal.SIGINT else "")
