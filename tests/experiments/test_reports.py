"""The commands that train several networks, tiny; and what they write."""

import dataclasses
import html
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import chex
import numpy as np
import pytest
from flax import nnx
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from PIL import Image
from rich.console import Console

from chansel_jax import SubKernelConv, resnet14
from chansel_jax.digest import digest
from chansel_jax.factorize import take_factors
from chansel_jax.functional import network_tree
from chansel_jax.training.augmentation import Augmentation
from chansel_jax.training.distillation import Distillation
from experiments import compare, compress, evaluate, predict, study
from experiments.cli.differences import differences
from experiments.cli.errors import CommandError
from experiments.cli.flags import parse, typed
from experiments.reporting import plots, report, tables
from experiments.studies import STUDIES, data, length, optimizers, overfit, runs, sweep, width
from experiments.studies.paired import compared
from experiments.training.experiment import build
from experiments.training.load import load_images, load_run
from experiments.training.settings import (
    RECIPES,
    DataSettings,
    NetworkSettings,
    Settings,
    build_network,
    decisive,
)


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


@pytest.fixture
def one_epoch(settings):
    return dataclasses.replace(settings.training, epochs=1)


def assert_whole(folder, *names):
    """Report, pictures and results are there, and the page holds its pictures."""
    for name in names:
        with Image.open(folder / f"{name}.png") as picture:
            picture.load()
    page = (folder / "report.html").read_text()
    assert len(re.findall('src="data:image/png;base64,', page)) == len(names)
    assert "<table>" in page and "<script" not in page and "http" not in page.split("</style>")[1]
    return (folder / "report.md").read_text(), json.loads((folder / "results.json").read_text())


# Reports


def test_page_shows_what_the_markdown_says(tmp_path):
    table = tables.table(["", "a"], [["x < y | z", "1"]])
    text = f"{table}\n\n![one](one.png) <b>not bold</b>"
    report.write(tmp_path, "A & B", text, {"one": Figure()})
    page = (tmp_path / "report.html").read_text()
    assert "<h1>A &amp; B</h1>" in page and "<td>x &lt; y | z</td>" in page
    assert "&lt;b&gt;" in page and 'alt="one"' in page and "one.png" not in page
    assert (tmp_path / "report.md").read_text().startswith("# A & B\n\n|  | a |\n| --- | ---: |\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "one.png",
        "report.html",
        "report.md",
    ]


@pytest.mark.parametrize(
    "name",
    ["*a*", "<b>", "_a_", "__a__", "a_b_c", "`a`", "[a](b)", "a\\*", "~~a~~", "&lt;", "A & B"],
)
def test_names_are_shown_as_they_are(tmp_path, name):
    report.write(tmp_path, name, tables.table(["", name], [[name, "1"]]), {})
    page = (tmp_path / "report.html").read_text()
    shown = html.escape(name, quote=False)
    assert f"<td>{shown}</td>" in page and f">{shown}</th>" in page
    heading, _ = (tmp_path / "report.md").read_text().split("\n", 1)
    assert MarkdownIt().render(heading) == f"<h1>{shown}</h1>\n"


STUDY_HEADINGS = ["", "parameters", "multiply-adds", "train loss", "highest accuracy", "epochs"]
STUDY_ROWS = [
    ["subkernel, 512 images", "27,363", "4,567,890", "0.123 ± 0.012", "84.17% ± 0.12%", "500"],
    ["chansel, BatchNorm between the parts", "1", "2", "0.5", "99.00%", "100"],
]


@pytest.mark.parametrize("width", [30, 60, 80, 120])
def test_wide_tables_fold_and_no_figure_or_word_is_cut(width):
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    tables.print_table(STUDY_HEADINGS, STUDY_ROWS, console, "title")
    printed = console.file.getvalue()
    assert printed.startswith("title\n") and max(map(len, printed.splitlines())) <= width
    for row in STUDY_ROWS:
        for cell in row[1:]:
            assert re.search(rf"  {re.escape(cell)} *(  |\n)", printed), cell
    for word in " ".join([*STUDY_HEADINGS, STUDY_ROWS[0][0], STUDY_ROWS[1][0]]).split():
        assert len(word) > width // 3 or re.search(rf"(^|\s){word}\s", printed, re.M), word
    assert len(re.findall("─+", printed)) == {30: 5, 60: 2, 80: 2, 120: 1}[width]


@pytest.mark.parametrize("width", [1, 5])
def test_a_table_is_printed_at_any_width(width):
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    tables.print_table(STUDY_HEADINGS, STUDY_ROWS, console)
    assert all(cell in console.file.getvalue() for row in STUDY_ROWS for cell in row[1:])


@pytest.mark.parametrize(("classes", "counts"), [(20, 400), (21, 0), (1000, 0)])
def test_picture_of_many_classes_has_a_bounded_size_and_no_counts(classes, counts):
    names = [str(i) for i in range(classes)]
    picture = plots.confusion_matrices({"one": np.eye(classes, dtype=int)}, names)
    (axes,) = picture.axes
    assert len(axes.texts) == counts and max(picture.get_size_inches()) < 14
    assert 20 <= len(axes.get_yticks()) <= 100 and axes.get_yticklabels()[0].get_text() == "0"


# Comparison


@pytest.mark.usefixtures("whole")
def test_comparison_of_both_convolutions(settings, dense, tmp_path, console):
    given = compare.Settings(
        network=settings.network,
        data=settings.data,
        training=settings.training,
        seeds=(0,),
        output=tmp_path,
    )
    lines = tmp_path / runs.RUNS
    for conv, folder in (("subkernel", dense), ("chansel", settings.workdir)):
        shutil.copytree(folder, tmp_path / "runs" / f"{conv}-seed0")
    compare.compare(given, console)
    for name, record in runs.read_records(lines).items():
        other = {"settings": {**record.settings, "seed": 1}}
        other["summary"] = record.summary | {"seed": 1, "final_val_accuracy": 0.25}
        new = dataclasses.replace(record, name=name.replace("seed0", "seed1"), **other)
        runs.write_record(lines, new)

    # Finished runs need their lines only.
    shutil.rmtree(tmp_path / "runs")
    compare.compare(dataclasses.replace(given, seeds=(0, 1)), console)
    text, results = assert_whole(tmp_path, "curves", "confusion")
    assert "compiled" not in console.file.getvalue()
    assert "| parameters | 431 | 247 |" in text and "the seeds 0, 1" in text
    assert "published" not in text  # the classes are others
    for networks in results["networks"].values():
        assert [network["seed"] for network in networks] == [0, 1]
    values = [network["final_val_accuracy"] for network in results["networks"]["chansel"]]
    row = next(line for line in text.splitlines() if "accuracy, last epoch" in line)
    assert f"{np.mean(values):.2%} ± {np.std(values, ddof=1):.2%} |" in row
    assert "--seeds=0,1" in results["command"] and str(tmp_path) not in results["command"]


def measured(**figures):
    """The record of a run whose shares and losses are one half where no others are given."""
    summary = dict.fromkeys(
        (
            *("best_val_loss", "train_loss_at_best", "val_accuracy_at_best", "final_val_accuracy"),
            *("best_val_accuracy", "seconds_per_epoch"),
        ),
        0.5,
    )
    summary |= {
        "parameters": 1,
        "multiply_adds": 1,
        "images": {"train": 1},
        "epochs": 1,
        "dataset": "folder",
    }
    scores = {"validation-flip-averaged": {"loss": 0.5, "accuracy": 0.5}}
    metrics = [{"epoch": 1, "val_loss": 0.5}]
    return runs.Record("", {}, {}, metrics, summary | figures, scores)


def test_accuracy_among_five_is_compared_where_it_was_measured():
    many = [measured(best_val_top5_accuracy=share) for share in (0.75, 0.8)]
    of_all = sweep.Outcome("all", many), sweep.Outcome("few", many[:1])
    of_some = sweep.Outcome("some", [many[0], measured()])
    rows = dict((row[0], row[1:]) for row in compare.table(of_all, ("a", "b"))[1])
    # The deviation of two is their distance over the root of two.
    expected = ["77.50% ± 3.54%", "75.00%"]
    assert rows["highest validation top-5 accuracy of all epochs"] == expected
    (_, rows) = compare.table([of_some], ("a", "b"))
    assert not any("top-5" in heading for heading, *_ in rows)


@pytest.mark.parametrize(
    ("parameters", "classes", "images", "shown"),
    [
        (27363, ("dog", "cat", "bird"), 12_000, True),
        (27363, ("dog", "cat", "bird"), 900, True),
        (97731, ("dog", "cat", "bird"), 12_000, False),
        (27363, ("dog", "cat", "cow"), 12_000, False),
    ],
)
def test_published_figures_stand_beside_the_same_network_and_classes(
    parameters, classes, images, shown
):
    run = measured(parameters=parameters, images={"train": images})
    headings, rows = compare.table([sweep.Outcome("chansel", [run])], classes)
    assert headings == ["", "chansel", *["chansel, published"] * shown]
    run.summary["dataset"] = "silhouettes"
    assert compare.table([sweep.Outcome("chansel", [run])], classes)[0] == ["", "chansel"]
    cells = {row[0]: row[1:] for row in rows}
    assert cells["validation accuracy, last epoch"] == ["50.00%", *[""] * shown]
    assert cells.get("score in the competition") == (["", "81.53 %"] if shown else None)
    seconds = {12_000: "8.51", 900: ""}[images]
    assert cells["seconds an epoch"] == ["0.50", *[seconds] * shown]


# Studies


@pytest.mark.parametrize("name", STUDIES)
def test_every_row_of_a_study_is_a_network(name):
    entries = STUDIES[name].entries(DataSettings(), 20)
    assert len(entries) >= 3
    origins = STUDIES[name].origins
    described = {(repr(settings), origins.get(label)) for label, settings in entries.items()}
    assert len(described) == len(entries)
    for settings in entries.values():
        assert settings.training.epochs in (20, 40, 80, 20 * overfit.FEW_EPOCHS_FACTOR)
    order = list(entries)
    for label, origin in origins.items():
        assert order.index(origin.label) < order.index(label)
    assert STUDIES[name].reference in (None, *map(sweep.network_of, entries))


def test_factors_change_what_they_say():
    entries = overfit.settings_of(DataSettings(), 20)
    plain = entries["chansel, as the original"]
    for label, changes in overfit.FACTORS.items():
        found = differences(decisive(plain), decisive(entries[f"chansel, {label}"]))
        assert len(found) == len(changes), label
    norm = entries["chansel, BatchNorm between the parts"]
    assert norm == dataclasses.replace(plain, network=NetworkSettings(norm=True))
    free = entries["subkernel, no regularisers"].training
    assert (free.dropout_rate, free.optimization.weight_decay) == (0, 0)
    assert free.augmentation == Augmentation(crop_padding=0, flip=False)
    few = entries["chansel, 512 images, no regularisers"]
    assert few.data.train_images == 512 and few.training.epochs == 100


def test_every_optimiser_has_rates_and_a_decay_of_its_own():
    entries = optimizers.settings_of(DataSettings(), 20)
    assert len(entries) == 2 * 3 * 4
    found = entries["subkernel, sgd at 0.3"]
    how = found.training.optimization
    assert found.conv == "subkernel" and (how.optimizer, how.weight_decay) == ("sgd", 5e-4)
    assert how.learning_rate == 0.3
    best = entries["chansel, muon at 0.02"].training
    assert best == dataclasses.replace(RECIPES["best"], epochs=20)


def test_longer_trainings_and_their_teacher():
    entries = length.settings_of(DataSettings(), 20)
    epochs = {label: settings.training.epochs for label, settings in entries.items()}
    assert epochs["averaged, 2 × as long"] == 40 and epochs[length.TEACHER] == 20
    alone, taught = (entries[f"mixup{more}, 4 × as long"] for more in ("", " and teacher"))
    assert alone == taught and alone.training.augmentation.mixup == 0.2
    teacher = entries[length.TEACHER]
    assert (teacher.conv, teacher.network.width) == ("subkernel", 32)


def test_published_recipe_keeps_its_shares_of_the_epochs():
    for epochs, steps in ((200, (100, 150, 180)), (20, (10, 15, 18)), (2, (1, 2))):
        (first, *_) = data.settings_of(DataSettings(), epochs).values()
        assert first.training.optimization.step_epochs == steps


def test_dense_networks_of_equal_cost():
    assert width.costs("chansel", 16)[0] == 27363 and width.costs("subkernel", 16)[0] == 174787
    widths = width.dense_widths()
    for wanted in width.WIDTHS:
        for kind, cost in enumerate(width.costs("chansel", wanted)):
            nearest = min(abs(width.costs("subkernel", w)[kind] / cost - 1) for w in widths)
            assert nearest < 0.15


def test_a_study_from_beginning_to_end(settings, one_epoch, monkeypatch, tmp_path, console):
    def entries(data, epochs):
        chosen = Settings(network=settings.network, data=data, training=one_epoch)
        return {
            "few, none / all": dataclasses.replace(
                chosen, data=dataclasses.replace(data, train_images=32)
            ),
            "all": chosen,
        }

    chosen = dataclasses.replace(
        STUDIES["overfit"],
        entries=entries,
        published=[("theirs", "1 M", "99 %")],
        published_classes=3,
    )
    monkeypatch.setitem(STUDIES, "overfit", chosen)
    given = study.Settings("overfit", data=settings.data, epochs=1, only="^few|x", output=tmp_path)
    (outcome,) = study.study(given, console)
    text, results = assert_whole(tmp_path, "picture")
    assert outcome.runs[0].summary["images"] == {"train": 32, "validation": 27}
    assert 0 < outcome.mean("plain_train_accuracy") <= 1
    assert "| few, none / all | 247 |" in text and "the whole study has `--epochs=100`" in text
    assert "| theirs (published) | 1 M |" in text
    command = results["command"]
    expected = "python -m experiments.study overfit --epochs=1 '--only=^few|x' --dataset"
    assert command.startswith(expected)
    assert "theirs (published)" in console.file.getvalue()
    monkeypatch.setitem(STUDIES, "overfit", dataclasses.replace(chosen, published_classes=10))
    study.study(given, console)
    assert "published" not in (tmp_path / "report.md").read_text()  # the classes are others
    (record,) = runs.read_records(tmp_path / runs.RUNS).values()
    assert record == outcome.runs[0] == runs.record_of(tmp_path / "runs" / "few-none-all-seed0")
    with pytest.raises(CommandError, match="only=many matches none of: few, none / all; all"):
        study.study(dataclasses.replace(given, only="many"), console)


def test_rows_that_need_another_row_s_network(
    settings, dense, one_epoch, monkeypatch, tmp_path, console
):
    rows = {
        "dense": dataclasses.replace(settings, conv="subkernel", workdir=None),
        "factors": dataclasses.replace(settings, training=one_epoch, workdir=None),
        "taught": dataclasses.replace(settings, training=one_epoch, workdir=None),
    }
    origins = {name: sweep.Origin("dense", use) for name, use in ORIGINS.items()}
    chosen = dataclasses.replace(
        STUDIES["factors"], entries=lambda *_: rows, origins=origins, reference="dense"
    )
    monkeypatch.setitem(STUDIES, "factors", chosen)
    shutil.copytree(dense, tmp_path / "runs" / "dense-seed0")
    given = study.Settings("factors", data=settings.data, only="factors|taught", output=tmp_path)
    of_dense, *others = study.study(given, console)
    assert [outcome.label for outcome in (of_dense, *others)] == list(rows)
    (factors,), (taught,) = (outcome.runs for outcome in others)
    run = load_run(dense, "last")
    begun = build_network(rows["factors"], 3)
    take_factors(begun, run.network)
    assert (factors.begins_with, factors.teacher) == (digest(network_tree(begun)), None)
    parameters = digest(network_tree(run.network))
    assert taught.begins_with is None and taught.teacher["parameters_sha256"] == parameters

    # The column of differences, image by image.
    labels = load_images(run, settings.data.data_dir)[0].splits["validation"].labels
    right = [
        record.evaluations["validation"]["predictions"] == labels
        for record in (taught, *of_dense.runs)
    ]
    gains = right[0].astype(float) - right[1]
    expected = f"{100 * gains.mean():+.2f} ± {100 * gains.std(ddof=1) / len(gains) ** 0.5:.2f}"
    text = (tmp_path / "report.md").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("| taught |"))
    assert line.endswith(f"| {expected} than dense |") and "| points more |" in text

    # Finished runs need their lines only, although what they began with is gone.
    shutil.rmtree(tmp_path / "runs")
    again = Console(file=io.StringIO(), width=160)
    assert study.study(given, again)[1:] == others and "compiled" not in again.file.getvalue()


ORIGINS = {"factors": "factors", "taught": "teacher"}


def test_folds_that_there_are_not_are_refused_before_any_training(settings, images, tmp_path):
    data = dataclasses.replace(settings.data, data_dir=images / "train")
    given = study.Settings("cost", data=data, seeds=(0, 5), output=tmp_path)
    with pytest.raises(
        CommandError, match="^seeds=5 is the .*fold too: --fold=5 must be at most 4"
    ):
        study.study(given, Console(quiet=True))
    given = dataclasses.replace(given, data=dataclasses.replace(data, fold=3))
    with pytest.raises(CommandError, match="^fold=3: in this study each of --seeds is the fold"):
        study.study(given, Console(quiet=True))
    assert not (tmp_path / "runs.jsonl").exists()


def test_differences_over_folds_take_the_images_of_each(settings, images, tmp_path):
    """Of two seeds the one row is always right, the other about one and about no class."""
    data = dataclasses.replace(settings.data, data_dir=images / "train")
    entries = {name: Settings(data=data) for name in ("chansel-w16", "subkernel-w6")}
    outcomes = []
    for label, wrong in (("chansel-w16", ()), ("subkernel-w6", (1, 2))):
        records = []
        for seed in (0, 1):
            labels = runs.image_labels(dataclasses.replace(data, fold=seed), "validation")
            taken = np.where(np.isin(labels, wrong[seed:]), 0, labels)
            found = {"validation": {"predictions": taken.tolist()}}
            given = {"settings": {"seed": seed}, "evaluations": found}
            given["data"] = {"images": {"train": 4, "validation": 1}}
            records.append(dataclasses.replace(measured(), **given))
        outcomes.append(sweep.Outcome(label, records))
    found = compared(outcomes, STUDIES["cost"], entries)
    # Two thirds and one third of the images are gained: their mean, and the root of their variance
    # 1/18, times 1/2 for two folds and 1/4 for the images that both are trained on.
    assert found == {"chansel-w16": "+50.00 ± 20.41 than subkernel-w6"}
    older = [
        sweep.Outcome(
            o.label, [dataclasses.replace(r, evaluations={"validation": {}}) for r in o.runs]
        )
        for o in outcomes
    ]
    assert compared(older, STUDIES["cost"], entries) == {}
    assert compared(outcomes[1:], STUDIES["cost"], entries) == {}


@pytest.mark.parametrize("name", STUDIES)
def test_rows_that_others_are_compared_with_are_rows(name):
    chosen = STUDIES[name]
    labels = {sweep.network_of(label) for label in chosen.entries(DataSettings(), 60)}
    named = {*chosen.references, *chosen.references.values(), chosen.reference} - {None}
    assert named <= labels


def test_every_picture_can_be_drawn():
    summary = {
        name: 0.5
        for name in (
            *("final_val_accuracy", "final_train_loss"),
            *("plain_train_accuracy", "plain_train_loss"),
            *("parameters", "multiply_adds", "seconds_per_epoch"),
        )
    } | {"epochs": 1}
    data = {"images": {"validation": 100}, "digests": {"validation": "a"}, "class_names": "ab"}
    row = {
        name: 0.5 for name in ("epoch", "train_loss", "val_loss", "train_accuracy", "val_accuracy")
    }
    for name, chosen in STUDIES.items():
        outcomes = [
            sweep.Outcome(label, [runs.Record("", {}, data, [row], summary, {})])
            for label in chosen.entries(DataSettings(), 5)
        ]
        for shown in (outcomes, outcomes[:1], outcomes[1:]):
            picture = chosen.draw(shown)
            drawn = [line for axes in picture.axes for line in axes.get_lines()]
            assert drawn, name


# Compression


def test_compression_from_beginning_to_end(dense, settings, one_epoch, tmp_path, console):
    given = compress.Settings(
        dense,
        data_dir=settings.data.data_dir,
        ranks=(2,),
        training=one_epoch,
        output=tmp_path / "out",
    )
    (found,) = compress.compress(given, console)["compressed"]
    text, results = assert_whole(tmp_path / "out", "accuracy")
    # Each of two 3 × 3 convolutions, 4 to 4, has 144 parameters, and 2 · (4 + 9) · 4 after it.
    assert results["dense"]["parameters"] - found["parameters"] == 2 * (144 - 104)
    assert 0 < found["accuracy_before"] <= 1 and 0 < found["accuracy_recalibrated"] <= 1
    assert f"| rank 2 | {found['parameters']:,} | 2 2 |" in text
    assert "| as cut | recalibrated | fine-tuned | with the teacher |" in text
    assert text.count("python -m experiments") == 2 and text.count("--data-dir=PATH") == 2
    assert len(results["energies"]) == 2
    assert results["command"].startswith("python -m experiments.compress --workdir=PATH ")
    for shares in results["energies"].values():
        assert sum(shares) == pytest.approx(1)
    assert "experiments.train --conv=subkernel" in results["dense"]["command"]
    assert results["dense"]["command"] in text
    alone, distilled = runs.read_records(tmp_path / "out" / runs.RUNS).values()
    assert (alone.name, distilled.name) == ("rank-2", "rank-2-distilled")
    assert alone.settings == distilled.settings and alone.begins_with == distilled.begins_with
    assert alone.teacher is None and distilled.teacher == {
        "parameters_sha256": results["dense"]["parameters_sha256"],
        "distillation_weight": 0.9,
        "temperature": 4.0,
    }
    assert alone.summary["params_sha256"] != distilled.summary["params_sha256"]

    # The fine-tuned network is built again from its config.
    run = load_run(tmp_path / "out" / "runs" / "rank-2-distilled")
    assert run.network.config.replaced == "spatial"
    assert run.network.config.ranks == (2, 2)

    # Finished runs need their lines only.
    shutil.rmtree(tmp_path / "out" / "runs")
    again = Console(file=io.StringIO(), width=160)
    assert compress.compress(given, again)["compressed"] == [found]
    assert "compiled" not in again.file.getvalue()
    other = dataclasses.replace(given, distillation=Distillation(0.5))
    with pytest.raises(CommandError, match=r"rank-2-distilled .*distillation_weight: 0.9 → 0.5"):
        compress.compress(other, again)
    alone = dataclasses.replace(given, distillation=Distillation(0.0))
    (found,) = compress.compress(alone, again)["compressed"]
    assert "accuracy_distilled" not in found
    assert "with the teacher" not in (tmp_path / "out" / "report.md").read_text()


def test_every_layer_has_a_rank_of_its_own_or_stays_dense():
    network = resnet14(SubKernelConv, blocks=(1, 1), width=4, rngs=nnx.Rngs(0))
    given = compress.Settings(Path("run"), ranks=(4,), energies=(0.6,))
    last, cut = compress.factorised(network, given).values()
    assert last.config.ranks == (0, 0, 0, 4) and 0 < max(cut.config.ranks) < 4
    with pytest.raises(CommandError, match="ranks=5 must be at most 4: above it every convolution"):
        compress.factorised(network, dataclasses.replace(given, ranks=(5,)))
    given = dataclasses.replace(given, energies=(1.0,))
    with pytest.raises(CommandError, match="energy 1.0: every convolution would become larger"):
        compress.factorised(network, given)


def test_batches_are_all_images_normalised(dense, settings, monkeypatch):
    monkeypatch.setattr(compress, "RECALIBRATION_BATCH", 50)
    run = load_run(dense)
    dataset, _ = load_images(run, settings.data.data_dir)
    found = np.concatenate(list(compress.batches(dataset.splits["train"], run)))
    assert found.shape == (180, 8, 8, 3) and found.dtype == np.float32
    np.testing.assert_allclose(found.mean((0, 1, 2)), 0, atol=1e-3)
    np.testing.assert_allclose(found.std((0, 1, 2)), 1, atol=1e-3)


def test_fine_tuning_has_a_dropout_rate_of_its_own(dense, settings):
    given = compress.Settings(dense, data_dir=settings.data.data_dir, ranks=(2,))
    run = load_run(dense)
    (network,) = compress.factorised(run.network, given).values()
    trained = build(compress.fine_tuning(run, given, network), network).network
    assert (network.dropout.rate, trained.dropout.rate) == (0.2, 0.0)
    chex.assert_trees_all_equal(network_tree(trained), network_tree(network))
    other = dataclasses.replace(settings, conv="chansel")
    with pytest.raises(ValueError, match=r"to begin with does not fit: .*depthwise is of shape"):
        build(other, network)


def test_compression_refuses(dense, settings, whole, images, tmp_path, console):
    with pytest.raises(CommandError, match="is a run of --conv=chansel"):
        compress.compress(compress.Settings(settings.workdir, data_dir=images), console)
    given = compress.Settings(dense, data_dir=images, ranks=(), parameter_budgets=(9,))
    with pytest.raises(ValueError, match="parameter_budget=9 must be at least the 247"):
        compress.compress(given, console)
    given = dataclasses.replace(given, ranks=(1, 5))
    with pytest.raises(CommandError, match="ranks=5 must be at most 2"):
        compress.compress(given, console)


# Command lines


@pytest.mark.parametrize(
    ("module", "words", "expected"),
    [
        (evaluate, ["--workdir=r", "--epoch=3"], {"workdir": Path("r"), "epoch": 3}),
        (evaluate, ["--workdir=r", "--epoch=last", "--split=test"], {"epoch": "last"}),
        (
            predict,
            ["--workdir=r", "--images=i", "--columns=file,class", "--labels=index"],
            {"images": Path("i"), "columns": ("file", "class"), "labels": "index"},
        ),
        (study, ["rank", "--seeds=0,1", "--only=r4"], {"name": "rank", "seeds": (0, 1)}),
        (compare, ["--recipe=best", "--networks=chansel-w32"], {"networks": ("chansel-w32",)}),
        (
            compress,
            ["--workdir=r", "--ranks=", "--energies=0.5,0.9", "--epochs=3"],
            {"ranks": (), "energies": (0.5, 0.9)},
        ),
    ],
)
def test_flags_reach_the_settings_and_can_be_typed_again(module, words, expected):
    name, recipes = module.__name__.split(".")[-1], getattr(module, "RECIPES", None)
    settings = parse(module.Settings, name, words, recipes)
    assert {key: getattr(settings, key) for key in expected} == expected
    again = shlex.split(typed(name, settings, recipes))[3:]
    found = parse(module.Settings, name, again, recipes)
    for path in ("workdir", "images"):
        if hasattr(settings, path):
            found = dataclasses.replace(found, **{path: getattr(settings, path)})
    assert found == settings
