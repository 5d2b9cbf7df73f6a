"""Networks by name, figures over seeds, where overfitting begins."""

import math

import pytest
from rich.console import Console

from experiments.cli.errors import CommandError
from experiments.reporting import report
from experiments.studies import drawing, sweep
from experiments.studies.runs import Record
from experiments.studies.sweep import Origin, Outcome, named, overfitting_epoch, run_all
from experiments.training.loop import DivergedError
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
    with pytest.raises(ValueError, match="must be named CONV"):
        named(name, Settings())


def record(summary, data=None):
    return Record("", {}, data or {}, [{"epoch": 1}], {"epochs": 1, **summary}, {})


def test_mean_and_deviation_by_hand():
    runs = [record({"loss": loss}) for loss in (1.0, 3.0)]
    assert Outcome("both", runs).spread("loss", ".2f") == "2.00 ± 1.41"
    assert Outcome("one", runs[:1]).spread("loss", ".1f") == "1.0"
    assert Outcome("one", runs[:1]).deviation("loss") == 0


def test_the_error_of_an_accuracy_by_hand():
    """Of 100 images, half of them right, the standard deviation is 5 %; of four folds 2.5 %."""

    def run(fold):
        data = {"digests": {"validation": fold}, "images": {"validation": 100}}
        return record({"accuracy": 0.5, "loss": 1}, data)

    for runs, error in (([run("a")], 0.05), ([run("a")] * 4, 0.05), ([*map(run, "abcd")], 0.025)):
        found = Outcome("a", runs)
        assert drawing.image_error(found, "accuracy") == pytest.approx(1.96 * error)
        assert drawing.image_error(found, "loss") == 0


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


def test_a_network_that_cannot_be_is_refused_before_any_training(tmp_path):
    entries = sweep.entries(("chansel", "chansel-r10"), Settings())
    with pytest.raises(CommandError, match="^chansel-r10: rank=10 must be "):
        run_all(entries, (0,), tmp_path, None)


def test_every_network_from_one_seed_before_the_next(monkeypatch, tmp_path):
    order = []

    def train(output, name, settings, console, wanted):
        order.append((settings.conv, settings.seed, output, name, wanted))
        return record({"loss": settings.seed})

    monkeypatch.setattr(sweep, "finished", train)
    entries = {"a, 1 / 5": Settings(), "b": Settings(conv="subkernel")}
    outcomes, diverged = run_all(entries, (7, 9), tmp_path, Console(quiet=True), "scores")
    assert order == [
        ("chansel", 7, tmp_path, "a-1-5-seed7", "scores"),
        ("subkernel", 7, tmp_path, "b-seed7", "scores"),
        ("chansel", 9, tmp_path, "a-1-5-seed9", "scores"),
        ("subkernel", 9, tmp_path, "b-seed9", "scores"),
    ]
    assert [(o.label, o.values("loss")) for o in outcomes] == [("a, 1 / 5", [7, 9]), ("b", [7, 9])]
    assert not diverged


def test_what_needs_a_network_that_diverged_is_left_out(monkeypatch, tmp_path):
    def train(output, name, settings, console, wanted):
        if settings.conv == "subkernel":
            raise DivergedError("the training loss is not finite at step 3")
        return record({"loss": 0})

    monkeypatch.setattr(sweep, "finished", train)
    entries = {"a": Settings(), "b": Settings(conv="subkernel"), "c": Settings()}
    origins = {"c": Origin("b", "teacher")}
    outcomes, diverged = run_all(entries, (4,), tmp_path, Console(quiet=True), origins=origins)
    assert [outcome.label for outcome in outcomes] == ["a"]
    assert diverged[1] == "c, seed 4: b, whose network it needs, diverged"


def test_a_network_that_is_needed_and_gone_is_told_before_any_training(monkeypatch, tmp_path):
    monkeypatch.setattr(sweep, "read_records", lambda path: {"b-seed4": record({})})
    entries = {"b": Settings(), "c": Settings()}
    with pytest.raises(CommandError, match="^c, seed 4, needs the network of b-seed4, of which"):
        run_all(entries, (4,), tmp_path, None, origins={"c": Origin("b", "factors")})


def test_with_folds_every_seed_has_its_own(monkeypatch, tmp_path):
    folds = []

    def train(output, name, settings, console, wanted):
        folds.append((settings.seed, settings.data.fold))
        return record({"loss": 0})

    monkeypatch.setattr(sweep, "finished", train)
    run_all({"a": Settings()}, (3, 1), tmp_path, Console(quiet=True), folds=True)
    assert folds == [(3, 3), (1, 1)]


def test_further_seeds_are_trained_at_the_best_rate_only(monkeypatch, tmp_path):
    """Of two networks at two rates the one is best at the lower, the other at the higher."""
    losses = {("chansel", 0.01): 1.0, ("chansel", 0.02): 2.0}
    losses |= {("subkernel", 0.01): 4.0, ("subkernel", 0.02): 3.0}
    trained = []

    def train(output, name, settings, console, wanted):
        rate = settings.training.optimization.learning_rate
        trained.append((settings.conv, rate, settings.seed))
        return record({"loss": losses[settings.conv, rate], "accuracy": rate})

    monkeypatch.setattr(sweep, "finished", train)
    entries = sweep.at_rates({"a": Settings(), "b": Settings(conv="subkernel")}, (0.01, 0.02))
    given = entries, (5, 6, 7), tmp_path, Console(quiet=True)
    outcomes, _ = run_all(*given, tuned_by="loss")
    assert trained[4:] == [
        *(("chansel", 0.01, 6), ("subkernel", 0.02, 6)),
        *(("chansel", 0.01, 7), ("subkernel", 0.02, 7)),
    ]
    lengths = {outcome.label: len(outcome.runs) for outcome in outcomes}
    assert lengths == {"a at 0.01": 3, "a at 0.02": 1, "b at 0.01": 1, "b at 0.02": 3}
    best = [outcome.label for outcome in sweep.best_rates(outcomes, "accuracy")]
    assert best == ["a at 0.02", "b at 0.02"]


def test_a_run_that_chose_the_rate_by_validation_images_is_not_reported(monkeypatch, tmp_path):
    def train(output, name, settings, console, wanted):
        rate = settings.training.optimization.learning_rate
        return record({"final_val_accuracy": 50 * rate - settings.seed / 10})

    monkeypatch.setattr(sweep, "finished", train)
    entries = sweep.at_rates({"a": Settings()}, (0.01, 0.02))
    given = entries, (0, 1, 2), tmp_path, Console(quiet=True)
    outcomes, _ = run_all(*given, tuned_by="final_val_accuracy")
    values = [outcome.values("final_val_accuracy") for outcome in outcomes]
    assert values == [[0.5], [0.9, 0.8]]
    assert [[r.figures["final_val_accuracy"] for r in o.tried] for o in outcomes] == [[], [1.0]]
    assert [o.label for o in sweep.best_rates(outcomes, "final_val_accuracy")] == ["a at 0.02"]


def test_what_further_seeds_lose_does_not_take_the_first_away(monkeypatch, tmp_path):
    def train(output, name, settings, console, wanted):
        if settings.seed:
            raise DivergedError("the training loss is not finite at step 3")
        rate = settings.training.optimization.learning_rate
        return record({"loss": math.nan if rate < 0.02 else 1.0})

    monkeypatch.setattr(sweep, "finished", train)
    entries = sweep.at_rates({"a at home": Settings()}, (0.01, 0.02))
    outcomes, diverged = run_all(entries, (0, 1), tmp_path, Console(quiet=True), tuned_by="loss")
    assert [outcome.label for outcome in outcomes] == ["a at home at 0.01", "a at home at 0.02"]
    assert diverged == ["a at home at 0.02, seed 1: the training loss is not finite at step 3"]


def test_what_diverges_is_left_out_and_the_rest_trained(monkeypatch, tmp_path):
    def train(output, name, settings, console, wanted):
        if settings.conv == "subkernel" and settings.seed != 9:
            raise DivergedError("the training loss is not finite at step 3")
        return record({"loss": settings.seed})

    monkeypatch.setattr(sweep, "finished", train)
    entries = {"a": Settings(), "b": Settings(conv="subkernel")}
    outcomes, diverged = run_all(entries, (7, 9), tmp_path, Console(quiet=True))
    assert [(o.label, o.values("loss")) for o in outcomes] == [("a", [7, 9]), ("b", [9])]
    assert diverged == ["b, seed 7: the training loss is not finite at step 3"]
    with pytest.raises(CommandError, match="^b, seed 7: .* step 3$"):
        report.publish(tmp_path, "title", "text", {}, {}, [], Console(quiet=True), diverged)
    assert (tmp_path / "report.md").read_text().endswith(f"Not in the table: {diverged[0]}.")
    outcomes, diverged = run_all(entries, (7,), tmp_path, Console(quiet=True))
    assert [o.label for o in outcomes] == ["a"] and len(diverged) == 1
    with pytest.raises(CommandError, match="^b, seed 7: "):
        run_all({"b": entries["b"]}, (7,), tmp_path, Console(quiet=True))
