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

import numpy as np
import tyro
from rich.console import Console

from experiments.cli.command import run
from experiments.cli.console import make_console
from experiments.cli.errors import CommandError
from experiments.cli.flags import typed
from experiments.reporting import machine, report, tables
from experiments.studies import STUDIES
from experiments.studies.paired import difference
from experiments.studies.runs import check_runs_output, image_digests, image_labels
from experiments.studies.study import Study
from experiments.studies.sweep import Outcome, of_seed, run_all
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
    optimizers compares SGD, AdamW and Muon, each at its best rate; factors trains the same
    parameters from other beginnings and with another weight decay; length has longer trainings,
    averaged parameters and a teacher; cost sets accuracy against parameters, multiply-adds and
    seconds, with a fold of the images for each seed; rank compares ranks 1 to 9 with the dense
    network; width compares widths 16 to 44 with dense networks of equal cost; data compares both
    convolutions on CIFAR-10 with BSConv's recipe (it takes cifar10 for dog_cat_bird)."""
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
    data, epochs = settings.data, settings.epochs or chosen.epochs
    if data.dataset == "dog_cat_bird":
        data = dataclasses.replace(data, dataset=chosen.dataset)
    every = chosen.entries(data, epochs)
    wished = {label for label in every if re.search(settings.only, label)}
    if not wished:
        raise CommandError(f"only={settings.only} matches none of: {'; '.join(every)}")
    wished |= {chosen.origins[label].label for label in wished & chosen.origins.keys()}
    entries = {
        label: dataclasses.replace(row, reading=settings.reading)
        for label, row in every.items()
        if label in wished
    }
    output = settings.output or Path("runs", f"study-{settings.name}-{data.dataset}")
    check_runs_output(output, data, f"study {settings.name}")
    for seed in settings.seeds if chosen.folds else ():
        image_digests(dataclasses.replace(data, fold=seed))  # refuses what there is not
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
    differences = compared(outcomes, chosen, entries)
    command, shown = typed("study", settings), table(outcomes, chosen, scored, differences)
    results = {
        "command": command,
        "written_with": machine.versions(),
        "rows": {o.label: [run.figures for run in o.runs] for o in outcomes},
    }
    described = text(outcomes, settings, chosen, shown, command)
    pictures = {"picture": chosen.draw(outcomes)}
    report.publish(
        output, chosen.question, described, pictures, results, [shown], console, diverged
    )
    return outcomes


def compared(
    outcomes: Sequence[Outcome], chosen: Study, entries: Mapping[str, TrainSettings]
) -> dict[str, str]:
    """By label, how far a row lies from the reference, with the standard error of this."""

    def right(outcome: Outcome) -> dict[int, np.ndarray]:
        found = {}
        for record in outcome.runs:
            seed = record.settings["seed"]
            data = of_seed(entries[outcome.label], seed, chosen.folds).data
            predictions = record.evaluations["validation"]["predictions"]
            found[seed] = np.asarray(predictions) == image_labels(data, "validation")
        return found

    references = {outcome.label: outcome for outcome in outcomes}
    if chosen.reference not in references:
        return {}
    other, found = right(references.pop(chosen.reference)), {}
    for label, outcome in references.items():
        if measured := difference(right(outcome), other, folds=chosen.folds):
            found[label] = "{:+.2f} ± {:.2f}".format(*(100 * share for share in measured))
    return found


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
    gained = [f"points more than {chosen.reference}"] if differences else []
    for label, parameters, accuracy in chosen.published:
        measured = "test accuracy" if "test" in scored else "accuracy"
        cells = {"parameters": parameters, measured: accuracy}
        rows.append([f"{label} (published)", *(cells.get(name, "") for name in columns)])
    return ["", *columns, *gained], rows


def text(
    outcomes: Sequence[Outcome],
    settings: Settings,
    chosen: Study,
    shown: tables.Table,
    command: str,
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
    if chosen.folds:
        seeds += ", and of each seed on another fold"
    epochs = settings.epochs or chosen.epochs
    short = f" (with `--epochs={epochs}`; the whole study has `--epochs={chosen.epochs}`)"
    train = (
        "The train loss and accuracy are those of the plain training images after the last epoch."
        if "train" in chosen.scored
        else "The train loss is the mean over the steps of the last epoch."
    )
    error = (
        f" Behind the points more than {chosen.reference} stands their standard error, from the "
        "same images and seeds."
        if chosen.reference
        else ""
    )
    note = f" {chosen.note(epochs)}" if chosen.note(epochs) else ""
    published = f"\n\nPublished: {chosen.published_note}." if chosen.published else ""
    return f"""\
Each network was trained {trained}{short if epochs != chosen.epochs else ""}, from \
{seeds}, and validated on {runs[0]["images"]["validation"]:,} images. {train} The validation loss \
and the accuracy are those after the last epoch; the lowest loss and the highest accuracy are the \
best of all epochs.{error}{note}

{tables.table(*shown)}{published}

![{chosen.question}](picture.png)

```bash
{command}
```
"""


if __name__ == "__main__":
    run(main, Settings, "study")
