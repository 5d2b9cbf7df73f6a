import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from commands import Command, environment, train_arguments, train_command
from PIL import Image
from rich.console import Console

from chansel_jax.digest import digest
from chansel_jax.errors import OneLineError
from chansel_jax.functional import network_tree
from chansel_jax.ops import native
from chansel_jax.torch_weights import save_safetensors
from chansel_jax.training import checkpoint
from chansel_jax.training.augmentation import Augmentation
from chansel_jax.training.distillation import Teacher
from chansel_jax.training.optimizer import OptimizerSettings, make_schedule
from experiments import evaluate
from experiments.cli import command
from experiments.cli.ending import EXIT_SAVED
from experiments.cli.errors import CommandError, Interrupted
from experiments.reporting.machine import cpu_name
from experiments.studies.runs import record_of
from experiments.training import loop
from experiments.training import run as runs
from experiments.training.beginning import read_beginning
from experiments.training.experiment import build, load_data
from experiments.training.load import load_run
from experiments.training.run import train_and_evaluate
from experiments.training.settings import (
    DataSettings,
    NetworkSettings,
    ReadingSettings,
    build_network,
)
from experiments.training.workdir import WorkdirError


def run(settings):
    """The summary, and what was printed."""
    console = Console(file=io.StringIO(), width=120)
    summary = train_and_evaluate(settings, console)
    return summary, console.file.getvalue()


def variant(settings, workdir, **changes):
    """`settings` with another folder, and changes to the run or its training."""
    fields = {field.name for field in dataclasses.fields(settings)}
    of_training = {name: changes.pop(name) for name in list(changes) if name not in fields}
    training = dataclasses.replace(settings.training, **of_training)
    return dataclasses.replace(settings, workdir=workdir, training=training, **changes)


def snapshot(folder):
    """Every file's bytes and time of change."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


# As many devices as in this process, so that sums are added in the same order.
TWO_DEVICES = environment(devices=2)


def await_path(path):
    """Waits until a checkpoint, which is written in the background, is there."""
    deadline = time.monotonic() + 300
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)


def copy_run(source, target):
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return target


def test_run_leaves_all_its_files(settings, whole):
    workdir = settings.workdir
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert json.loads((workdir / "config.json").read_text())["settings"]["network"]["width"] == 4
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir())[-2:] == ["2", "3"]
    assert list(workdir.glob("events.out.tfevents.*"))
    with Image.open(workdir / "losses.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("change", [{"workdir": Path("pyproject.toml/run")}, {"resume": "must"}])
def test_folder_is_refused_before_images_are_loaded(settings, tmp_path, monkeypatch, change):
    monkeypatch.setattr(runs, "build", lambda *_: pytest.fail("the images were loaded"))
    with pytest.raises(WorkdirError):
        run(variant(settings, **{"workdir": tmp_path / "run", **change}))


@pytest.mark.parametrize("in_memory", [True, False])
def test_few_images_of_each_class_train_and_validate(settings, in_memory):
    few = dataclasses.replace(settings.data, train_images=7, validation_images=3)
    splits = load_data(few, in_memory).splits
    assert np.bincount(splits["train"].labels).tolist() == [3, 2, 2]
    assert splits["validation"].labels.tolist() == [0, 1, 2]
    assert len(splits["validation"].images) == 3
    many = dataclasses.replace(settings.data, validation_images=28)
    message = "validation_images=28 must be at most the 27 validation images"
    with pytest.raises(OneLineError, match=message):
        load_data(many, in_memory)


@pytest.mark.parametrize("in_memory", [True, False])
def test_random_labels_are_those_of_the_training_images_in_another_order(settings, in_memory):
    plain = load_data(settings.data, in_memory).splits
    found, again, other = (
        load_data(dataclasses.replace(settings.data, random_labels=True, split_seed=seed)).splits
        for seed in (0, 0, 1)
    )
    train = found["train"].labels
    np.testing.assert_array_equal(train, again["train"].labels)
    counts = [np.bincount(splits["train"].labels).tolist() for splits in (plain, found)]
    assert counts[0] == counts[1]
    assert (train != plain["train"].labels).any() and (train != other["train"].labels).any()
    assert found["train"].summary.digest != plain["train"].summary.digest
    np.testing.assert_array_equal(found["validation"].labels, plain["validation"].labels)


def test_missing_library_is_told(settings, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "there is no compiler")
    copy = copy_run(settings.workdir, tmp_path / "copy")
    _, printed = run(variant(settings, copy))
    assert "note: the layers are not computed in C++" in printed
    assert "as long: there is no compiler\n" in printed
    assert "C++" not in whole[1]


def test_summary_holds_the_runs_figures(settings, whole):
    summary, _ = whole
    assert summary == json.loads((settings.workdir / "summary.json").read_text())
    lines = (settings.workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    best = min(rows, key=lambda row: row["val_loss"])
    expected = {
        "model": "resnet14",
        "conv": "chansel",
        "dataset": "folder",
        "device": cpu_name(),
        "epochs": 3,
        "best_epoch": best["epoch"],
        "best_val_loss": best["val_loss"],
        "train_loss_at_best": best["train_loss"],
        "best_val_accuracy": max(row["val_accuracy"] for row in rows),
        "final_val_accuracy": rows[-1]["val_accuracy"],
        "seconds_per_epoch": sorted(row["seconds"] for row in rows)[1],
    }
    assert summary.items() >= expected.items()
    # Width 4: counted by hand in the tests of counting; here that both figures arrive.
    assert summary["parameters"] > 0 and summary["multiply_adds"] > summary["parameters"]
    assert re.fullmatch("[0-9a-f]{64}", summary["params_sha256"])


def test_network_learns_what_colours_tell(whole):
    assert whole[0]["best_val_accuracy"] > 0.9


def test_output_names_devices_sizes_layers_and_epochs(whole):
    _, output = whole
    for part in ("2 × cpu", "jax ", "180 train, 27 validation", "blocks.0.conv2", "total"):
        assert part in output
    assert len(re.findall(r"^ +[123]  +\d\.\d{4}  ", output, re.MULTILINE)) == 3


FIGURES = ("params_sha256", "best_val_loss", "train_loss_at_best", "best_epoch")


def signal_after(monkeypatch, epoch, step, number):
    """Has the process get a signal after a step of an epoch."""
    save_or_stop = loop.save_or_stop

    def signalled(experiment, manager, signal_received, taken, progress):
        if (len(progress.history) + 1, taken) == (epoch, step):
            signal.raise_signal(number)
        save_or_stop(experiment, manager, signal_received, taken, progress)

    monkeypatch.setattr(loop, "save_or_stop", signalled)


@pytest.mark.parametrize(
    ("epoch", "step", "number"),
    [(1, 1, signal.SIGTERM), (3, 10, signal.SIGINT)],
)
def test_stopped_run_ends_bit_for_bit_like_the_whole(
    settings, whole, tmp_path, monkeypatch, epoch, step, number
):
    part = variant(settings, tmp_path / "part")
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch, pytest.raises(Interrupted) as stopped:
        signal_after(patch, epoch, step, number)
        run(part)
    place = f"after step {step} of 11 of epoch {epoch}"
    assert f"stopped by {number.name} {place}; all is saved" in str(stopped.value)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    summary, output = run(part)
    assert f"resumed {place}" in output
    assert {name: summary[name] for name in FIGURES} == {name: whole[0][name] for name in FIGURES}
    assert len((tmp_path / "part" / "metrics.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "part" / "unfinished").exists()


@pytest.fixture(scope="module")
def two_colours(images, tmp_path_factory):
    """Images of two of the three classes."""
    root = tmp_path_factory.mktemp("two")
    for split in ("train", "validation"):
        for name in ("blue", "red"):
            (root / split).mkdir(exist_ok=True)
            copy_run(images / split / name, root / split / name)
    return DataSettings(dataset="folder", data_dir=root)


@pytest.mark.parametrize("from_file", [False, True])
def test_training_begins_with_given_parameters(settings, whole, two_colours, tmp_path, from_file):
    """Those of the best checkpoint; the classifier is new where the classes differ."""
    network, path = load_run(settings.workdir).network, settings.workdir
    if from_file:
        path = tmp_path / "weights.safetensors"
        save_safetensors(network, path)
    begun = variant(settings, tmp_path / "run", init=path)
    other = dataclasses.replace(begun, data=two_colours)
    wanted, fresh = network_tree(network), network_tree(build_network(other, 2))
    for given, new in ((begun, False), (other, True)):
        experiment = build(given, *_beginning(given))
        found = network_tree(experiment.network)
        assert experiment.new_classifier is new
        if new:
            chex.assert_trees_all_equal(
                found["params"].pop("classifier"), fresh["params"]["classifier"]
            )
            wanted["params"].pop("classifier")
        chex.assert_trees_all_equal(found, wanted)


def _beginning(settings):
    network, class_names = read_beginning(settings, print)
    return network, None, class_names


def test_classes_of_other_names_have_a_new_classifier(settings, whole, images, tmp_path):
    """A run knows the names of its classes, so that as many are not the same."""
    given = variant(settings, tmp_path / "run", init=settings.workdir)
    renamed = dataclasses.replace(given.data, classes=("red", "green", "blue"))
    experiment = build(dataclasses.replace(given, data=renamed), *_beginning(given))
    assert experiment.new_classifier


def test_a_stopped_run_goes_on_with_the_same_file_alone(settings, whole, tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    network = load_run(settings.workdir).network
    save_safetensors(network, path)
    part = variant(settings, tmp_path / "part", init=path)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_after(patch, 1, 2, signal.SIGTERM)
        run(part)
    network.classifier.bias[...] += 1
    save_safetensors(network, path)
    with pytest.raises(WorkdirError, match=r"other settings \(begins_with: \w{8}… → \w{8}…\)"):
        run(part)
    with pytest.raises(WorkdirError, match="begins_with: .* → None"):
        run(variant(part, part.workdir, init=None))


def test_weights_of_another_network_are_named_in_a_line(settings, whole, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_safetensors(load_run(settings.workdir).network, path)
    wide = variant(settings, tmp_path / "run", init=path, network=NetworkSettings(blocks=(1,)))
    with pytest.raises(
        CommandError, match=r"15 of another shape\): \S+ has shape \(4, 4\), not"
    ) as refused:
        run(wide)
    assert "\n" not in str(refused.value)


def test_a_stopped_run_with_every_option_ends_like_the_whole(
    settings, whole, dense, tmp_path, monkeypatch
):
    """Also with a teacher, and where it goes on from a stream."""
    every = variant(
        settings,
        tmp_path / "whole",
        init=settings.workdir,
        optimization=dataclasses.replace(settings.training.optimization, clip_norm=0.5, branches=2),
        augmentation=Augmentation(cutout=2, mixup=0.4, cutmix=1.0, resized_crop=True),
        accumulate=2,
        label_smoothing=0.1,
        ema=0.9,
        epochs=2,
    )
    teacher = Teacher(load_run(dense).network)
    console = Console(file=io.StringIO(), width=120)
    expected = train_and_evaluate(every, console, teacher=teacher)
    assert "begins with the parameters of" in console.file.getvalue()
    part = variant(every, tmp_path / "part", save_every_steps=5)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_after(patch, 1, 7, signal.SIGTERM)  # within a batch, and between saves
        train_and_evaluate(part, console, teacher=teacher)
    with pytest.raises(WorkdirError, match="teacher"):
        run(part)
    streamed = dataclasses.replace(part, reading=ReadingSettings("streaming", workers=0))
    found = train_and_evaluate(streamed, console, teacher=teacher)
    assert {name: found[name] for name in FIGURES} == {name: expected[name] for name in FIGURES}
    averages = network_tree(load_run(part.workdir, "last").network)
    assert digest(tuple(averages.values())) == found["params_sha256"]


def test_signal_at_an_epochs_end_stops_there(settings, whole, tmp_path, monkeypatch):
    epoch, part = 3, variant(settings, tmp_path / "part")
    with (
        monkeypatch.context() as patch,
        pytest.raises(Interrupted, match=f"after epoch {epoch} of"),
    ):
        train_epoch = loop.train_epoch

        def train_and_signal(*arguments):
            progress = train_epoch(*arguments)
            if len(progress.history) == epoch:
                signal.raise_signal(signal.SIGTERM)
            return progress

        patch.setattr(loop, "train_epoch", train_and_signal)
        run(part)
    summary, output = run(part)
    assert f"resumed after epoch {epoch} of 3" in output
    assert summary["params_sha256"] == whole[0]["params_sha256"]


def test_saving_within_epochs_changes_nothing_and_is_resumed(
    settings, whole, tmp_path, monkeypatch
):
    part = variant(settings, tmp_path / "part", save_every_steps=4)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        save_or_stop = loop.save_or_stop

        def killed(experiment, manager, signal_received, taken, progress):
            save_or_stop(experiment, manager, signal_received, taken, progress)
            if (len(progress.history), taken) == (1, 10):
                raise KeyboardInterrupt

        patch.setattr(loop, "save_or_stop", killed)
        run(part)
    summary, output = run(variant(part, part.workdir, save_every_steps=3))
    assert "resumed after step 8 of 11 of epoch 2" in output
    assert summary["params_sha256"] == whole[0]["params_sha256"]


def test_damaged_checkpoint_within_an_epoch_is_set_aside(settings, whole, tmp_path, monkeypatch):
    part = variant(settings, tmp_path / "part")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_after(patch, 2, 5, signal.SIGTERM)
        run(part)
    for path in (part.workdir / "unfinished" / "16" / "state" / "d").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    summary, output = run(part)
    assert "checkpoint of step 16 is damaged" in output and "resumed after epoch 1 of 3" in output
    assert summary["params_sha256"] == whole[0]["params_sha256"]
    assert [path.name for path in (part.workdir / "unfinished").iterdir()] == ["damaged-16"]


def test_terminated_process_resumes_bit_for_bit(settings, whole, tmp_path):
    workdir = tmp_path / "ended"
    with Command(train_command(settings, workdir), TWO_DEVICES) as process:
        await_path(workdir / "checkpoints" / "1")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_SAVED
    assert errors.startswith("the run was stopped by SIGTERM") and errors.count("\n") == 1
    assert (workdir / "checkpoints" / "1").exists() and not (workdir / "summary.json").exists()
    summary, output = run(variant(settings, workdir, resume="must"))
    assert "resumed after " in output
    assert summary["params_sha256"] == whole[0]["params_sha256"]


def test_streamed_images_train_bit_for_bit_like_those_in_memory(
    settings, whole, tmp_path, monkeypatch
):
    """From the beginning, and where a run goes on with the other input than before."""
    memory, streaming = ReadingSettings("memory"), ReadingSettings("streaming", workers=0)
    part = variant(settings, tmp_path / "part", reading=streaming)
    for reading, stop in ((streaming, (1, 5)), (streaming, (2, 3)), (memory, (3, 2))):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            signal_after(patch, *stop, signal.SIGTERM)
            run(dataclasses.replace(part, reading=reading))
    summary, output = run(part)
    assert "resumed after step 2 of 11 of epoch 3" in output
    assert summary["params_sha256"] == whole[0]["params_sha256"]
    assert summary["best_val_loss"] == pytest.approx(whole[0]["best_val_loss"], rel=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_of_damaged_files_is_one_line(settings, tmp_path, monkeypatch, workers):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "cache"))
    load_data(settings.data, in_memory=False)
    (path,) = (tmp_path / "cache").rglob("*train.array_record*")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(OneLineError, match="cannot be read") as error:
        run(variant(settings, tmp_path / "run", reading=ReadingSettings("streaming", workers)))
    assert "\n" not in str(error.value)


def test_interrupt_from_a_terminal_lets_a_streaming_run_save(settings, whole, tmp_path):
    """It reaches the processes that decode, too."""
    workdir = tmp_path / "run"
    command = train_command(settings, workdir)
    command += ["--input=streaming", "--workers=1", "--save-every-steps=1"]
    with Command(command, TWO_DEVICES, new_session=True) as process:
        await_path(workdir / "unfinished" / "1")
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_SAVED
    assert errors.startswith("the run was stopped by SIGINT") and errors.count("\n") == 1
    summary, _ = run(variant(settings, workdir, resume="must"))
    assert summary["params_sha256"] == whole[0]["params_sha256"]


def test_larger_images_train_resnet18_through_a_stream(settings, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            image = Image.fromarray(rng.integers(0, 256, (80, 96, 3), np.uint8))
            image.save(tmp_path / "images" / name / f"{i}.jpg")
    data = DataSettings(dataset="folder", data_dir=tmp_path / "images", image_size=64)
    streamed = variant(
        settings,
        tmp_path / "run",
        data=data,
        network=NetworkSettings(model="resnet18", blocks=(1,), width=4),
        reading=ReadingSettings("streaming", workers=0),
        epochs=1,
        batch_size=8,
    )
    summary, output = run(streamed)
    assert "16 train, 4 validation images of 64 × 64 × 3" in output
    assert summary["model"] == "resnet18" and np.isfinite(summary["best_val_loss"])


def test_finished_run_is_reported_again(settings, whole):
    summary, output = run(settings)
    assert summary == whole[0]
    assert "resumed after epoch 3 of 3" in output and "compiled" not in output


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: os.truncate(path, 0)])
@pytest.mark.parametrize("name", ["metrics.jsonl", "losses.png", "events", "summary.json"])
def test_lost_files_of_a_finished_run_are_made_again(settings, whole, tmp_path, name, damage):
    workdir = copy_run(settings.workdir, tmp_path / "run")
    (path,) = workdir.glob(f"{name}*")
    before = path.read_bytes()
    damage(path)
    summary, output = run(variant(settings, workdir))
    assert summary == whole[0] and "resumed after epoch 3 of 3" in output
    assert "compiled" not in output
    if name == "events":  # they are of another second
        assert any(path.stat().st_size == len(before) for path in workdir.glob("events*"))
    else:
        assert path.read_bytes() == before


def edited(history):
    """Has a checkpoint of an older version, whose record had no digest, hold another history."""

    def edit(record):
        del record["sha256"]
        record["run"]["history"] = history

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda record: record["run"]["history"][-1].update(val_loss=0.1), "digest of its record"),
        (lambda record: record.update(run=None), "digest of its record"),
        (edited(None), "history=None must be an array"),
        (edited([{"epoch": 1}]), r"history.0. lacks .*, val_accuracy, val_loss"),
    ],
)
def test_changed_record_is_damage(settings, whole, tmp_path, edit, message):
    workdir = copy_run(settings.workdir, tmp_path / "run")
    for folder in (workdir / "checkpoints").iterdir():
        path = folder / "record" / "metadata"
        record = json.loads(path.read_text())
        edit(record)
        path.write_text(json.dumps(record))
    with pytest.raises(OneLineError, match=f"no checkpoint .* restored .*{message}"):
        run(variant(settings, workdir))


def test_damaged_newest_checkpoint_is_trained_again(settings, whole, tmp_path):
    workdir = copy_run(settings.workdir, tmp_path / "damaged")
    for path in (workdir / "checkpoints" / "3" / "state" / "d").iterdir():
        os.truncate(path, path.stat().st_size // 2)
    scores = workdir / "evaluation-validation.json"
    scores.write_text("{}")
    summary, output = run(variant(settings, workdir))
    assert "checkpoint of epoch 3 is damaged" in output and "resumed after epoch 2" in output
    assert summary["params_sha256"] == whole[0]["params_sha256"]
    assert not scores.exists()  # they were of what is trained anew


def test_finished_run_without_checkpoints_keeps_its_records(settings, whole, tmp_path):
    workdir = copy_run(settings.workdir, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    before = (workdir / "summary.json").read_bytes(), (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(OneLineError, match="is finished and its checkpoints are gone: take anoth"):
        run(variant(settings, workdir))
    after = (workdir / "summary.json").read_bytes(), (workdir / "metrics.jsonl").read_bytes()
    assert after == before


def test_run_of_an_older_version_goes_on(settings, whole, tmp_path):
    """One that did not know every setting yet."""
    workdir = copy_run(settings.workdir, tmp_path / "run")
    config = json.loads((workdir / "config.json").read_text())
    assert config["settings"]["training"].pop("accumulate") == 1
    network = config["settings"]["network"]
    network["init"] = network.pop("initialiser")  # as it was called
    (workdir / "config.json").write_text(json.dumps(config))
    assert load_run(workdir).settings.network == settings.network
    assert "resumed after epoch 3 of 3" in run(variant(settings, workdir))[1]
    with pytest.raises(OneLineError, match=r"\(accumulate: 1 → 2\)"):
        run(variant(settings, workdir, accumulate=2))


def test_other_settings_are_named_and_nothing_is_touched(settings, whole):
    before = snapshot(settings.workdir)
    other = variant(
        settings,
        settings.workdir,
        batch_size=8,
        optimization=dataclasses.replace(settings.training.optimization, weight_decay=0.0),
    )
    with pytest.raises(OneLineError, match=r"batch_size: 16 → 8; .*weight_decay: 0\.05 → 0\.0"):
        run(other)
    assert snapshot(settings.workdir) == before


def test_other_images_are_named(settings, whole, images, tmp_path):
    tree = copy_run(images, tmp_path / "images")
    next((tree / "train" / "red").iterdir()).unlink()
    workdir = copy_run(settings.workdir, tmp_path / "run")
    other = variant(settings, workdir, data=DataSettings(dataset="folder", data_dir=tree))
    with pytest.raises(OneLineError, match="train: 180 → 179"):
        run(other)


def test_never_resuming_keeps_the_older_run(settings, whole, tmp_path):
    workdir = copy_run(settings.workdir, tmp_path / "run")
    before = snapshot(workdir).values()
    short = variant(settings, workdir, epochs=1, resume="never")
    summary, output = run(short)
    assert summary["epochs"] == 1 and "run.1" in output
    assert list(snapshot(tmp_path / "run.1").values()) == list(before)


def test_must_resume_needs_a_run(settings, tmp_path):
    with pytest.raises(OneLineError, match="resume=must"):
        run(variant(settings, tmp_path / "none", resume="must"))
    assert not (tmp_path / "none").exists()


def test_network_that_is_not_finite_stops_though_its_loss_is(settings, tmp_path, monkeypatch):
    """As XLA lets ReLU make zeros of NaN; here of statistics, which no loss of training sees."""
    train_epoch = loop.train_epoch

    def with_nan(experiment, progress, *arguments):
        statistics = jax.tree.map(lambda leaf: leaf * np.nan, progress.state.batch_stats)
        state = dataclasses.replace(progress.state, batch_stats=statistics)
        return train_epoch(experiment, dataclasses.replace(progress, state=state), *arguments)

    monkeypatch.setattr(loop, "train_epoch", with_nan)
    with pytest.raises(CommandError, match=r"the network is not finite at step 10 \(epoch 1\)"):
        run(variant(settings, tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(settings, tmp_path):
    explosive = OptimizerSettings(
        optimizer="sgd", schedule="constant", learning_rate=1e30, warmup_fraction=0
    )
    workdir = tmp_path / "explosive"
    with pytest.raises(CommandError, match=r"not finite at step 1 \(epoch 1\); nothing was saved"):
        run(variant(settings, workdir, optimization=explosive))
    train_epoch = loop.train_epoch

    def exploding(experiment, progress, *arguments):
        if len(progress.history) == 1:
            params = jax.tree.map(lambda leaf: leaf * np.inf, progress.state.params)
            state = dataclasses.replace(progress.state, params=params)
            progress = dataclasses.replace(progress, state=state)
        return train_epoch(experiment, progress, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_epoch", exploding)
        with pytest.raises(CommandError, match=r"step 11 \(epoch 2\); the checkpoint of epoch 1"):
            run(variant(settings, tmp_path / "later"))
    with checkpoint.open_checkpoints(tmp_path / "later", print) as checkpoints:
        assert checkpoints["epoch"].all_steps() == [1]
    assert (tmp_path / "later" / "losses.png").exists()


FULL_DISK = """
import resource, runpy, sys, time
from pathlib import Path
from experiments.training import loop

checkpoint = Path(sys.argv.pop(), "checkpoints", "1")
train_epoch = loop.train_epoch

def train_and_fill(*arguments):
    progress = train_epoch(*arguments)
    if len(progress.history) == 2:  # large files can be written no longer
        while not checkpoint.exists():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    return progress

loop.train_epoch = train_and_fill
runpy.run_module("experiments.train", run_name="__main__")
"""


def test_full_disk_ends_the_run_and_keeps_the_older_checkpoints(settings, whole, tmp_path):
    workdir = tmp_path / "run"
    (tmp_path / "full.py").write_text(FULL_DISK)
    words = [tmp_path / "full.py", *train_arguments(settings, workdir), workdir]
    with Command(words, TWO_DEVICES) as process:
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert re.fullmatch("error: cannot save under .*; older checkpoints stay\n", errors)
    summary, output = run(variant(settings, workdir))
    assert "resumed after epoch 1 of 3" in output and "damaged" not in output
    assert summary["params_sha256"] == whole[0]["params_sha256"]


def test_accumulated_batches_train_as_well(settings, tmp_path):
    summary, _ = run(variant(settings, tmp_path / "run", batch_size=32, accumulate=2, epochs=4))
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    # 180 images are five batches, of which the last of all is the twentieth update.
    schedule = make_schedule(settings.training.optimization, epochs=4, steps_per_epoch=5)
    assert json.loads(rows[-1])["learning_rate"] == pytest.approx(float(schedule(19)))
    assert summary["best_val_accuracy"] > 0.6


def test_workdir_among_the_images_is_refused(settings, images):
    with pytest.raises(WorkdirError, match="lies within the images"):
        run(variant(settings, images / "train" / "run"))
    assert not (images / "train" / "run").exists()


def test_command_fails_with_one_line(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "experiments.train", "--dataset=folder", "--data-dir=missing"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_subkernel_trains_in_bfloat16(settings, tmp_path):
    network = dataclasses.replace(settings.network, dtype="bfloat16")
    summary, _ = run(variant(settings, tmp_path / "run", conv="subkernel", network=network))
    assert summary["conv"] == "subkernel" and summary["best_val_accuracy"] > 0.9


def test_a_command_may_transfer_what_steps_may_not(settings, whole):
    with jax.transfer_guard("disallow"):
        command._call(run, settings)


def test_a_command_without_compilation_is_refused(settings, capsys):
    with jax.disable_jit(), pytest.raises(SystemExit):
        command._call(run, settings)
    assert capsys.readouterr().err == (
        "error: JAX_DISABLE_JIT=1 must not be set: commands compile what they run\n"
    )


def test_a_wrong_instruction_set_is_refused(settings, capsys, monkeypatch):
    monkeypatch.setattr(native, "_library", native._library.__wrapped__)
    monkeypatch.setenv(native.LIMIT, "sse9")
    with pytest.raises(SystemExit):
        command._call(run, settings)
    told = "CHANSEL_JAX_INSTRUCTION_SET='sse9' must be one of ('baseline', 'avx2', 'avx512')"
    assert capsys.readouterr().err == f"error: {told}\n"


def test_many_classes_have_their_accuracy_among_five(settings, tmp_path):
    rng = np.random.default_rng(0)
    for number in range(10):
        (tmp_path / "images" / str(number)).mkdir(parents=True)
        for i in range(3):
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            image.save(tmp_path / "images" / str(number) / f"{i}.png")
    data = DataSettings(dataset="folder", data_dir=tmp_path / "images", train_per_class=2)
    summary, output = run(variant(settings, tmp_path / "run", data=data, epochs=1))
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert row["val_accuracy"] <= row["val_top5_accuracy"] == summary["best_val_top5_accuracy"] <= 1
    assert "top 5" in output and "top-5" in output
    console = Console(file=io.StringIO(), width=200)
    evaluate.evaluate(evaluate.Settings(tmp_path / "run"), console)
    evaluation = json.loads((tmp_path / "run" / "evaluation-validation.json").read_text())
    assert evaluation["top5_accuracy"] == pytest.approx(row["val_top5_accuracy"])
    assert f"top-5 accuracy {evaluation['top5_accuracy']:.2%}\n" in console.file.getvalue()
    found = record_of(tmp_path / "run").figures["plain_validation_top5_accuracy"]
    assert found == evaluation["top5_accuracy"]
