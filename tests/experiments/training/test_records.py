"""What a run leaves in its folder, read back."""

import errno
import itertools
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from chansel_jax.files import replaced, write_json
from experiments.reporting import plots
from experiments.training.records import (
    best_epoch,
    recorded,
    summarise,
    summary_writer,
)

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's tab:blue and tab:orange


def row(epoch, train_loss=1.0, val_loss=1.0, val_accuracy=0.5, seconds=1.0):
    return {
        "epoch": epoch,
        "train_loss": train_loss,
        "val_loss": val_loss,
        "val_accuracy": val_accuracy,
        "seconds": seconds,
    }


HISTORY = [
    row(1, 1.5, 1.0, 0.50, 9.0),
    row(2, 0.9, 0.4, 0.80, 2.0),
    row(3, 0.7, 0.6, 0.85, 3.0),
    row(4, 0.5, 0.4, 0.85, 2.5),
    row(5, 0.3, 0.5, 0.75, 2.25),
]


# The best epoch and the summary


def test_best_epoch_is_the_first_of_lowest_validation_loss():
    assert best_epoch(HISTORY)["epoch"] == 2


@pytest.mark.parametrize("epochs, seconds", [(1, 9.0), (2, 5.5), (3, 3.0), (4, 2.75), (5, 2.5)])
def test_time_of_an_epoch_is_the_median(epochs, seconds):
    assert summarise(HISTORY[:epochs])["seconds_per_epoch"] == seconds


def test_summary_is_that_worked_out_by_hand():
    assert summarise(HISTORY) == {
        "epochs": 5,
        "best_epoch": 2,
        "best_val_loss": 0.4,
        "train_loss_at_best": 0.9,
        "val_accuracy_at_best": 0.8,
        "best_val_accuracy": 0.85,
        "best_accuracy_epoch": 3,
        "final_train_loss": 0.3,
        "final_val_loss": 0.5,
        "final_val_accuracy": 0.75,
        "seconds_per_epoch": 2.5,
    }


def test_best_accuracy_among_five_is_of_the_epochs_that_know_it():
    rows = [row | {"val_top5_accuracy": 0.9 + row["epoch"] / 100} for row in HISTORY[2:4]]
    assert summarise([*HISTORY[:2], *rows])["best_val_top5_accuracy"] == pytest.approx(0.94)


# JSON


def test_written_json_reads_back_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})
    write_json(path, {"loss": 0.1, "network": {"conv": "chansel"}})
    assert json.loads(path.read_text()) == {"loss": 0.1, "network": {"conv": "chansel"}}
    assert list(tmp_path.iterdir()) == [path]


def test_json_is_whole_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"epoch": 1})
    seen = []

    def replace(partial, target):
        seen.extend([json.loads(partial.read_text()), json.loads(target.read_text())])
        raise OSError("the power fails here")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="power"):
        write_json(path, {"epoch": 2})
    assert seen == [{"epoch": 2}, {"epoch": 1}]
    assert json.loads(path.read_text()) == {"epoch": 1}


def test_json_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "summary.json", []

    def fsync(descriptor):
        assert not path.exists()
        synced.append(os.fstat(descriptor))

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(path, {"epoch": 1})
    (found,) = synced
    assert os.path.samestat(found, path.stat()) and found.st_size == path.stat().st_size


def test_content_that_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"epoch": 1})
    with pytest.raises(TypeError):
        write_json(path, {"epoch": object()})
    assert json.loads(path.read_text()) == {"epoch": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_what_it_names_is_written(tmp_path):
    path, link = tmp_path / "real.json", tmp_path / "link.json"
    write_json(path, {"epoch": 1})
    link.symlink_to(path.name)
    write_json(link, {"epoch": 2})
    assert link.is_symlink() and json.loads(path.read_text()) == {"epoch": 2}


def test_a_pipe_takes_what_is_written_and_stays(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reading = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    write_json(path, {"epoch": 1})
    assert json.loads(os.read(reading, 100)) == {"epoch": 1} and path.is_fifo()
    os.close(reading)
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_of_writing_names_the_file(tmp_path):
    path = tmp_path / "summary.json"
    message = re.escape(f"No space left on device: '{path}'")
    with pytest.raises(OSError, match=message), replaced(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# Metrics


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """The events of TensorBoard's only file: frames of length, checksum, data, checksum."""
    [path] = workdir.glob("events.out.tfevents.*")
    data, position, found = path.read_bytes(), 0, []
    while position < len(data):
        (length,) = struct.unpack_from("<Q", data, position)
        start = position + 12
        found.append(Event.FromString(data[start : start + length]))
        position = start + length + 4
    assert position == len(data)
    return found


def scalars(workdir):
    return {
        (event.step, value.tag): value.simple_value
        for event in events(workdir)
        for value in event.summary.value
    }


def test_rows_are_there_as_soon_as_they_are_written(tmp_path):
    with recorded(tmp_path, [], "title") as write:
        for count, line in enumerate(HISTORY, start=1):
            write(line)
            assert metrics(tmp_path) == HISTORY[:count]
    assert metrics(tmp_path) == HISTORY


def test_history_replaces_what_was_there_and_rows_follow_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    with recorded(tmp_path, HISTORY[:3], "title") as write:
        assert metrics(tmp_path) == HISTORY[:3]
        write(HISTORY[3])
    assert metrics(tmp_path) == HISTORY[:4]


def test_tensorboard_gets_every_figure_at_its_epoch(tmp_path):
    with recorded(tmp_path, [], "title") as write:
        for line in HISTORY:
            write(line)
    written = scalars(tmp_path)
    names = ("train_loss", "val_loss", "val_accuracy", "seconds")
    assert written.keys() == set(itertools.product(range(1, 6), names))
    for (epoch, name), value in written.items():
        assert value == np.float32(HISTORY[epoch - 1][name])


def test_tensorboard_is_told_to_forget_what_comes_after_the_history(tmp_path):
    with recorded(tmp_path, HISTORY[:3], "title") as write:
        write(HISTORY[3])
    starts = [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [4]
    assert {step for step, _ in scalars(tmp_path)} == {4}


# The plot


def rows_of(path, colour):
    """The vertical positions of the pixels of `colour`, from the top."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    return np.nonzero((pixels == colour).all(axis=-1))[0]


@pytest.mark.parametrize("train_loss, val_loss", [(0.1, 2.0), (2.0, 0.1)])
def test_plot_draws_train_losses_blue_and_validation_losses_orange(tmp_path, train_loss, val_loss):
    path = tmp_path / "losses.png"
    history = [row(epoch, train_loss, val_loss) for epoch in range(1, 9)]
    plots.save(plots.losses(history, history[0], "title"), path)
    blue, orange = rows_of(path, BLUE), rows_of(path, ORANGE)
    assert len(blue) > 100 and len(orange) > 100
    assert (np.median(blue) > np.median(orange)) == (train_loss < val_loss)


def test_plot_of_a_single_epoch_shows_both_losses(tmp_path):
    path = tmp_path / "losses.png"
    plots.save(plots.losses(HISTORY[:1], HISTORY[0], "title"), path)
    assert len(rows_of(path, BLUE)) and len(rows_of(path, ORANGE))


def test_commands_start_without_matplotlib():
    program = "import sys, experiments.train; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_pytorch_is_not_imported(monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] in ("torch", "tensorboardX"):
            monkeypatch.delitem(sys.modules, name)
    assert summary_writer().__module__ == "tensorboardX.writer"
    assert not any(name.partition(".")[0] == "torch" for name in sys.modules)
