"""Answers an open question with a table of trainings.

    python -m experiments.study overfit

Every row is a run of experiments.train, from each seed; the same command, typed again, goes on
where it stopped.
"""

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from chansel_jax.data.errors import DataError
from experiments.cli.command import run
from experiments.cli.console import make_console
from experiments.cli.errors import CommandError
from experiments.cli.flags import typed
from experiments.reporting import machine, report, tables
from experiments.studies import STUDIES
from experiments.studies.paired import compared
from experiments.studies.runs import check_runs_output, image_digests
from experiments.studies.study import Study
from experiments.studies.sweep import Outcome, run_all
from experiments.training.scores import Wanted
from experiments.training.settings import DataSettings, ReadingSettings, check_seeds
from experiments.training.settings import Settings as TrainSettings

Name = Literal[tuple(STUDIES)]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Runs a study: a small table of trainings, with a picture."""

    name: tyro.conf.Positional[Name]
    """overfit shows what keeps channel selection from fitting; underfit asks whether that is the
    layer, the number of parameters or the optimiser, at the best learning rate of each network;
    optimizers compares SGD, AdamW and Muon, each at its best rate, and cost sets accuracy against
    parameters, multiply-adds and seconds (in both each seed has a fold of the images, and the first
    chooses the rates); factors trains the same parameters from other beginnings, with another
    weight decay and in several branches; length has longer trainings, averaged parameters and a
    teacher; rank compares ranks 1 to 9 with the dense network; width compares widths 16 to 44 and
    ranks 2 to 4 with dense networks of equal cost; data compares both convolutions on CIFAR-10 with
    BSConv's recipe (it takes cifar10 for dog_cat_bird)."""
    data: DataSettings = DataSettings(dataset="dog_cat_bird")
    reading: ReadingSettings = ReadingSettings()
    epochs: int | None = None
    """Each training has this many epochs, of overfit's on 512 images five times as many; by default
    the study has its full length."""
    seeds: tuple[int, ...] = (0,)
    """Each row is trained from each of these seeds."""
    only: str = ""
    """Only the rows are trained whose label this regular expression matches somewhere:
    "w6|random" takes those with either. Rows whose network another row needs are trained too."""
    output: Path | None = None
    """The runs and the report are written to this folder, by default runs/study-NAME-DATASET."""

    def __post_init__(self):
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be at least 1")
        check_seeds(self.seeds)
        try:
            re.compile(self.only)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"only={self.only} is no regular expression: {error}") from error


def main(settings: Settings) -> None:
    """Runs the study, and prints how it goes."""
    study(settings, make_console())


def study(settings: Settings, console: Console) -> list[Outcome]:
    """Trains what is not trained yet and writes the report; returns what came out.

    Raises:
        OneLineError: if no row is chosen, the data are wrong, or a training fails.
        ValueError: if the study needs more images than `settings` leave.
    """
    chosen = STUDIES[settings.name]
    data = settings.data
    if data.dataset == "dog_cat_bird":
        data = dataclasses.replace(data, dataset=chosen.dataset)
    entries = chosen_entries(chosen, data, settings)
    output = settings.output or Path("runs", f"study-{settings.name}-{data.dataset}")
    check_runs_output(output, data, f"study {settings.name}")
    if chosen.folds:
        check_folds(data, settings.seeds)
    scored = [split for split in chosen.scored if split in image_digests(data)]
    wanted = [Wanted(split, "last") for split in scored]
    outcomes, diverged = run_all(
        entries,
        settings.seeds,
        output,
        console,
        wanted,
        chosen.tuned_by,
        chosen.origins,
        chosen.folds,
    )
    chosen = dataclasses.replace(chosen, published=chosen.published_beside(outcomes))
    differences = compared(outcomes, chosen, entries)
    command, shown = typed("study", settings), table(outcomes, chosen, scored, differences)
    results = {
        "command": command,
        "written_with": machine.versions(),
        "rows": {o.label: [run.figures for run in o.runs] for o in outcomes},
    }
    described = text(outcomes, settings, chosen, shown, command, differences)
    pictures = {"picture": chosen.draw(outcomes)}
    report.publish(
        output, chosen.question, described, pictures, results, [shown], console, diverged
    )
    return outcomes


def chosen_entries(
    chosen: Study, data: DataSettings, settings: Settings
) -> dict[str, TrainSettings]:
    """The rows that `settings.only` matches, and those whose networks they need.

    Raises:
        CommandError: if it matches none.
    """
    every = chosen.entries(data, settings.epochs or chosen.epochs)
    wished = {label for label in every if re.search(settings.only, label)}
    if not wished:
        raise CommandError(f"only={settings.only} matches none of: {'; '.join(every)}")
    wished |= {chosen.origins[label].label for label in wished & chosen.origins.keys()}
    return {
        label: dataclasses.replace(row, reading=settings.reading)
        for label, row in every.items()
        if label in wished
    }


def check_folds(data: DataSettings, seeds: Sequence[int]) -> None:
    """Raises `CommandError` if some seed is no number of a fold; before any training."""
    if data.fold:
        raise CommandError(f"fold={data.fold}: in this study each of --seeds is the fold too")
    for seed in seeds:
        try:
            image_digests(dataclasses.replace(data, fold=seed))
        except DataError as error:
            raise CommandError(f"seeds={seed} is the number of the fold too: {error}") from error


def table(
    outcomes: Sequence[Outcome],
    chosen: Study,
    scored: Collection[str],
    differences: Mapping[str, str],
) -> tables.Table:
    """Headings and rows."""
    columns = {
        "parameters": ("parameters", ""),
        "multiply-adds": ("multiply_adds", ""),
        "epochs": ("epochs", ""),
        "train loss": ("final_train_loss", ".3f"),
        "validation loss": ("final_val_loss", ".3f"),
        "accuracy": ("final_val_accuracy", ".2%"),
        "lowest loss": ("best_val_loss", ".3f"),
        "highest accuracy": ("best_val_accuracy", ".2%"),
        "seconds an epoch": ("seconds_per_epoch", ".1f"),
    }
    if "train" in scored:
        columns["train loss"] = ("plain_train_loss", ".4f")
    for split in scored:
        if split != "validation":  # which has a column already
            columns[f"{split} accuracy"] = (f"plain_{split}_accuracy", ".2%")
    rows = []
    for outcome in outcomes:
        first = outcome.runs[0].figures
        cells = (
            f"{first[name]:,}" if isinstance(first[name], int) else outcome.spread(name, form)
            for name, form in columns.values()
        )
        gained = [differences.get(outcome.label, "")] if differences else []
        rows.append([outcome.label, *cells, *gained])
    gained = ["points more"] if differences else []
    for label, parameters, accuracy in chosen.published:
        measured = "test accuracy" if "test" in scored else "accuracy"
        cells = {"parameters": parameters, measured: accuracy}
        blank = [""] * len(gained)
        rows.append([f"{label} (published)", *(cells.get(name, "") for name in columns), *blank])
    return ["", *columns, *gained], rows


def text(
    outcomes: Sequence[Outcome],
    settings: Settings,
    chosen: Study,
    shown: tables.Table,
    command: str,
    differences: Mapping[str, str],
) -> str:
    """The report."""
    runs = [run.summary for outcome in outcomes for run in outcome.runs]
    lengths = sorted({(run["images"]["train"], run["epochs"]) for run in runs})
    trained = " or ".join(
        f"on {images:,} images for {tables.counted(epochs, 'epoch')}" for images, epochs in lengths
    )
    seeds = f"seed {settings.seeds[0]}"
    if len(settings.seeds) > 1:
        seeds = f"seeds {', '.join(map(str, settings.seeds))}"
        seeds += " (the table shows the mean ± the standard deviation)"
    epochs = settings.epochs or chosen.epochs
    short = f" (with `--epochs={epochs}`; the whole study has `--epochs={chosen.epochs}`)"
    train = (
        "The train loss and accuracy are those of the plain training images after the last epoch."
        if "train" in chosen.scored
        else "The train loss is the mean over the steps of the last epoch."
    )
    error = (
        " Behind the points more stands their standard error, from the same seeds and images."
        if differences
        else ""
    )
    folds = " Each seed had another fold of the images for validation."
    note = f" {chosen.note(epochs)}" if chosen.note(epochs) else ""
    published = f"\n\nPublished: {chosen.published_note}." if chosen.published else ""
    return f"""\
Each network was trained {trained}{short if epochs != chosen.epochs else ""}, from \
{seeds}, and validated on {runs[0]["images"]["validation"]:,} images. {train} The validation loss \
and the accuracy are those after the last epoch; the lowest loss and the highest accuracy are the \
best of all epochs.{error}\
{folds if chosen.folds and settings.seeds[1:] else ""}{note}

{tables.table(*shown)}{published}

![{chosen.question}](picture.png)

```bash
{command}
```
"""


if __name__ == "__main__":
    run(main, Settings, "study")
