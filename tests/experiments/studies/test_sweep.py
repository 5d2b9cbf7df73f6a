"""Networks by name, figures over seeds, where overfitting begins."""

import dataclasses
import json
import shutil

import pytest
from rich.console import Console

from experiments.cli.errors import CommandError
from experiments.studies import sweep
from experiments.studies.sweep import Outcome, Trained, named, overfitting_epoch, run_all
from experiments.training.load import read_records
from experiments.training.run import DivergedError
from experiments.training.settings import NetworkSettings, Settings


@pytest.mark.parametrize(
    ("name", "conv", "width", "rank"),
    [
        ("subkernel", "subkernel", 20, 1),
        ("subkernel-w6", "subkernel", 6, 1),
        ("chansel", "chansel", 20, 3),
        ("chansel-w32", "chansel", 32, 3),
        ("chansel-r4", "chansel", 20, 4),
        ("chansel-w8-r2", "chansel", 8, 2),
    ],
)
def test_names(name, conv, width, rank):
    given = Settings(network=NetworkSettings(width=20, rank=3, norm=True))
    found = named(name, given)
    assert (found.conv, found.network.width, found.network.rank) == (conv, width, rank)
    assert found.network.norm == (conv == "chansel")


@pytest.mark.parametrize("name", ["", "dense", "chansel-32", "chansel-w", "chansel-r2-w8", "x-w3"])
def test_wrong_names(name):
    with pytest.raises(ValueError, match="must be CONV"):
        named(name, Settings())


def test_mean_and_deviation_by_hand():
    runs = [Trained({"loss": loss}, [], {}) for loss in (1.0, 3.0)]
    assert Outcome("both", runs).spread("loss", ".2f") == "2.00 ± 1.41"
    assert Outcome("one", runs[:1]).spread("loss", ".1f") == "1.0"
    assert Outcome("one", runs[:1]).deviation("loss") == 0


def history(losses):
    return [{"epoch": i + 1, "val_loss": loss} for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "epoch"),
    [
        ([5, 4, 3, 2, 1, 1, 1, 1, 1], None),
        ([5, 4, 3, 2, 1, 2, 3, 4, 5, 6], 5),
        ([3, 2, 2.0, 2, 2, 2.01, 2, 2], None),
        ([1.0], None),
        ([1.0, 2.0], None),
    ],
)
def test_overfitting_begins_where_the_mean_of_five_is_lowest(losses, epoch):
    assert overfitting_epoch(history(losses)) == epoch


def test_finished_run_is_one_of_the_same_settings_and_images(settings, whole, tmp_path):
    assert sweep.is_finished(settings)
    assert not sweep.is_finished(dataclasses.replace(settings, workdir=tmp_path))
    others = dataclasses.replace(settings, seed=1, network=NetworkSettings(width=8))
    with pytest.raises(CommandError, match=r"other settings \(width: 4 → 8; seed: 0 → 1\)"):
        sweep.is_finished(others)
    copy = tmp_path / "copy"
    shutil.copytree(settings.workdir, copy)
    (copy / "metrics.jsonl").write_text("")
    assert sweep.is_finished(dataclasses.replace(settings, workdir=copy))
    with pytest.raises(CommandError, match=f"records of the run in {copy} .*0 epochs of 3"):
        read_records(copy)
    (copy / "summary.json").write_text("[]")
    with pytest.raises(CommandError, match=f"records of the run in {copy} cannot be read"):
        read_records(copy)
    data = dataclasses.replace(settings.data, train_images=9)
    with pytest.raises(CommandError, match=r"train_images: None → 9; train: \w+… → "):
        sweep.is_finished(dataclasses.replace(settings, data=data))


def test_a_network_that_cannot_be_is_refused_before_any_training(tmp_path):
    entries = sweep.entries(("chansel", "chansel-r10"), Settings())
    with pytest.raises(CommandError, match="^chansel-r10: rank=10 must be "):
        run_all(entries, (0,), tmp_path, None)


def test_every_network_from_one_seed_before_the_next(monkeypatch, tmp_path):
    order = []

    def train(settings, console):
        order.append((settings.conv, settings.seed, settings.workdir.name))
        leave_records(settings)

    monkeypatch.setattr(sweep, "train_and_evaluate", train)
    dense = dataclasses.replace(Settings(), conv="subkernel")
    entries = {"a, 1 / 5": Settings(), "b": dense}
    outcomes, diverged = run_all(entries, (7, 9), tmp_path, Console(quiet=True))
    assert order == [
        ("chansel", 7, "a-1-5-seed7"),
        ("subkernel", 7, "b-seed7"),
        ("chansel", 9, "a-1-5-seed9"),
        ("subkernel", 9, "b-seed9"),
    ]
    assert [(o.label, o.values("loss")) for o in outcomes] == [("a, 1 / 5", [7, 9]), ("b", [7, 9])]
    assert outcomes[0].runs[0].history == [{"epoch": 1}] and not diverged


def test_what_diverges_is_left_out_and_the_rest_trained(monkeypatch, tmp_path):
    def train(settings, console):
        if settings.conv == "subkernel" and settings.seed != 9:
            raise DivergedError("the training loss is not finite at step 3")
        leave_records(settings)

    monkeypatch.setattr(sweep, "train_and_evaluate", train)
    entries = {"a": Settings(), "b": Settings(conv="subkernel")}
    outcomes, diverged = run_all(entries, (7, 9), tmp_path, Console(quiet=True))
    assert [(o.label, o.values("loss")) for o in outcomes] == [("a", [7, 9]), ("b", [9])]
    assert diverged == ["b, seed 7: the training loss is not finite at step 3"]
    assert diverged[0] in sweep.left_out(diverged)
    with pytest.raises(CommandError, match="^b, seed 7: .* step 3$"):
        sweep.refuse_diverged(diverged)
    outcomes, diverged = run_all(entries, (7,), tmp_path / "new", Console(quiet=True))
    assert [o.label for o in outcomes] == ["a"] and len(diverged) == 1
    with pytest.raises(CommandError, match="^b, seed 7: "):
        run_all({"b": entries["b"]}, (7,), tmp_path, Console(quiet=True))


def leave_records(settings):
    settings.workdir.mkdir(parents=True)
    (settings.workdir / "metrics.jsonl").write_text('{"epoch": 1}\n')
    summary = {"epochs": 1, "loss": settings.seed}
    (settings.workdir / "summary.json").write_text(json.dumps(summary))
