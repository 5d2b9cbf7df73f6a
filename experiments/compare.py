"""Compares channel selection with the dense convolution, as the original's table does.

    python -m experiments.compare --seeds=0,1,2

Trains every network from every seed, as experiments.train does it, and writes a report. The same
command, typed again, goes on where it stopped.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from chansel_jax.files import write_json
from experiments.cli.command import make_output, run
from experiments.cli.console import make_console
from experiments.cli.flags import typed
from experiments.reporting import machine, plots, report
from experiments.studies.sweep import (
    Outcome,
    entries,
    left_out,
    overfitting_epoch,
    refuse_diverged,
    run_all,
)
from experiments.training.scores import Wanted
from experiments.training.settings import (
    RECIPES,
    DataSettings,
    NetworkSettings,
    ReadingSettings,
    TrainingSettings,
    checked_seeds,
)
from experiments.training.settings import Settings as TrainSettings

PLAIN, MIRRORED = Wanted("validation"), Wanted("validation", flip_average=True)

# Of the PyTorch write-up, on https://www.kaggle.com/competitions/dog-vs-cat-vs-bird.
PUBLISHED = {
    "chansel": ("27,363", "", "~80", "0.4761 (0.43)", "", "", "", "", "81.53 %", "8.51"),
    "subkernel": ("174,787", "", "~80", "0.4012 (0.32)", "", "", "", "", "84.17 %", "4.81"),
}
PUBLISHED_CLASSES = {"bird", "cat", "dog"}
PUBLISHED_NOTE = """\
The published figures are those of a PyTorch write-up on the same classes of the original images: \
its accuracy is the score of a competition's test images, its losses are those of a split of its \
own, and it was timed on a GPU.

"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains both convolutions alike, from several seeds, and writes a report."""

    networks: tuple[str, ...] = ("subkernel", "chansel")
    """These networks are trained, each named CONV[-wWIDTH][-rRANK] as in chansel-w32 or
    chansel-r4."""
    network: NetworkSettings = NetworkSettings()
    data: DataSettings = DataSettings(dataset="dog_cat_bird")
    reading: ReadingSettings = ReadingSettings()
    training: TrainingSettings = RECIPES["short"]
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each network is trained from each seed, which decides the initial parameters, the order of
    the images, augmentation and dropout."""
    output: Path | None = None
    """The runs and the report are written to this folder, by default runs/compare-DATASET."""

    def __post_init__(self):
        checked_seeds(self.seeds)
        given = ",".join(self.networks)
        if not self.networks or len(set(self.networks)) < len(self.networks):
            raise ValueError(f"networks={given} must be different networks, at least one")
        try:
            entries(self.networks, TrainSettings())
        except ValueError as error:
            raise ValueError(f"networks={given}: {error}") from error


def main(settings: Settings) -> None:
    """Compares, and prints how it goes."""
    compare(settings, make_console())


def compare(settings: Settings, console: Console) -> dict[str, Any]:
    """Trains what is not trained yet and writes the report; returns what `results.json` holds.

    Raises:
        OneLineError: if a setting or the data is wrong, or a training fails.
    """
    output = settings.output or Path("runs", f"compare-{settings.data.dataset}")
    make_output(output)
    base = TrainSettings(
        network=settings.network,
        data=settings.data,
        reading=settings.reading,
        training=settings.training,
    )
    chosen = entries(settings.networks, base)
    scored = (PLAIN, MIRRORED)
    outcomes, diverged = run_all(chosen, settings.seeds, output / "runs", console, scored)
    confusions, class_names = confusion_of(outcomes)
    results = {
        "command": typed("compare", settings, RECIPES),
        "settings": dataclasses.asdict(settings.training),
        "written_with": machine.versions(),
        "networks": {outcome.label: [run.summary for run in outcome.runs] for outcome in outcomes},
    }
    write_json(output / "results.json", results)
    report.write(
        output,
        f"{' and '.join(settings.networks)} on {images_name(settings.data, class_names)}",
        text(outcomes, settings, class_names, results["command"]) + left_out(diverged),
        {
            "curves": plots.curves({o.label: [r.history for r in o.runs] for o in outcomes}),
            "confusion": plots.confusion_matrices(confusions, class_names),
        },
    )
    console.print()
    headings, *rows = table(outcomes, class_names)
    console.print(report.terminal_table(headings, rows))
    console.print(f"the results are written to {output}", markup=False)
    refuse_diverged(diverged)
    return results


def images_name(data: DataSettings, class_names: Sequence[str]) -> str:
    """What the images are called: the data set, or the classes of a folder."""
    return ", ".join(class_names) if data.dataset == "folder" else data.dataset


def confusion_of(outcomes: Sequence[Outcome]) -> tuple[Mapping[str, np.ndarray], tuple[str, ...]]:
    """Each network's confusion matrix on the validation images, summed over the seeds."""
    found = {}
    for outcome in outcomes:
        scores = [run.scores[PLAIN.name] for run in outcome.runs]
        found[outcome.label] = np.sum([each["confusion"] for each in scores], axis=0)
    return found, tuple(scores[0]["class_names"])


def table(outcomes: Sequence[Outcome], class_names: Sequence[str]) -> list[list[str]]:
    """The original's table with a column a network, and what it published for the same classes."""
    labels = [outcome.label for outcome in outcomes]
    columns = [column(outcome) for outcome in outcomes]
    published = [
        label
        for label, (parameters, *_) in zip(labels, columns, strict=True)
        if set(class_names) == PUBLISHED_CLASSES and parameters == PUBLISHED.get(label, [""])[0]
    ]
    headings = [
        "parameters",
        "multiply-adds",
        "overfitting epoch (validation loss)",
        "lowest validation loss (train loss of that epoch)",
        "validation accuracy, epoch of lowest loss",
        "the same, averaged over mirrored images",
        "validation accuracy, last epoch",
        "highest validation accuracy of all epochs",
        "score in the competition",
        "seconds an epoch",
    ]
    first = ["", *labels, *(f"{label}, published" for label in published)]
    columns += [PUBLISHED[label] for label in published]
    rows = (list(row) for row in zip(headings, *columns, strict=True))
    return [first, *(row for row in rows if any(row[1:]))]


def column(outcome: Outcome) -> list[str]:
    """The figures of one network: mean ± standard deviation over its seeds."""
    first = outcome.runs[0].summary
    turns = [overfitting_epoch(run.history) for run in outcome.runs]
    return [
        f"{first['parameters']:,}",
        f"{first['multiply_adds']:,}",
        ", ".join("none" if turn is None else str(turn) for turn in turns),
        f"{outcome.spread('best_val_loss', '.4f')} ({outcome.spread('train_loss_at_best', '.4f')})",
        outcome.spread("val_accuracy_at_best", ".2%"),
        outcome.spread(f"plain_{MIRRORED.name}_accuracy", ".2%"),
        outcome.spread("final_val_accuracy", ".2%"),
        outcome.spread("best_val_accuracy", ".2%"),
        "",
        outcome.spread("seconds_per_epoch", ".2f"),
    ]


def text(
    outcomes: Sequence[Outcome], settings: Settings, class_names: Sequence[str], command: str
) -> str:
    """The report."""
    headings, *rows = table(outcomes, class_names)
    note = PUBLISHED_NOTE if len(headings) > len(outcomes) + 1 else ""
    seeds = ", ".join(map(str, settings.seeds))
    epochs = settings.training.epochs
    images = outcomes[0].runs[0].summary["images"]
    devices = " and ".join(sorted({run.summary["device"] for o in outcomes for run in o.runs}))
    return f"""\
{images["train"]:,} images to train, {images["validation"]:,} to validate, {epochs} epochs, seeds \
{seeds}: mean ± standard deviation over the seeds. Train losses are those of the training steps, \
augmented and with dropout where the recipe has them; all else is measured on all validation \
images after the epoch. The overfitting epoch is that of the lowest validation loss (mean over \
five epochs), if it lies 2 % higher later; one a seed. Nothing was selected on any other images \
than the validation ones. Seconds an epoch are those of the training steps on {devices}.

{report.table(headings, rows)}

{note}![losses and accuracies; the bands reach from the least to the greatest seed](curves.png)

![validation images, checkpoints of lowest validation loss, sum over the seeds](confusion.png)

```bash
{command}
```
"""


if __name__ == "__main__":
    run(main, Settings, "compare", RECIPES)
