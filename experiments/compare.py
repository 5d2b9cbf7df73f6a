"""Compares channel selection with the dense convolution, as the original's table does.

    python -m experiments.compare --seeds=0,1,2

Trains every network from every seed, as experiments.train does it, and writes a report. The same
command, typed again, goes on where it stopped.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from experiments.cli.command import run
from experiments.cli.console import make_console
from experiments.cli.flags import check_different, typed
from experiments.reporting import machine, plots, report, tables
from experiments.studies.runs import check_runs_output
from experiments.studies.sweep import Outcome, entries, overfitting_epoch, run_all
from experiments.training.scores import Wanted
from experiments.training.settings import (
    RECIPES,
    DataSettings,
    NetworkSettings,
    ReadingSettings,
    TrainingSettings,
    check_seeds,
)
from experiments.training.settings import Settings as TrainSettings

PLAIN, MIRRORED = Wanted("validation"), Wanted("validation", flip_average=True)

SECONDS = "seconds an epoch"
TOP5 = "highest validation top-5 accuracy of all epochs"
# From the PyTorch write-up, https://www.kaggle.com/competitions/dog-vs-cat-vs-bird.
PUBLISHED = {
    "chansel": {
        "parameters": "27,363",
        "overfitting epoch (validation loss)": "~80",
        "lowest validation loss (train loss of that epoch)": "0.4761 (0.43)",
        "score in the competition": "81.53 %",
        SECONDS: "8.51",
    },
    "subkernel": {
        "parameters": "174,787",
        "overfitting epoch (validation loss)": "~80",
        "lowest validation loss (train loss of that epoch)": "0.4012 (0.32)",
        "score in the competition": "84.17 %",
        SECONDS: "4.81",
    },
}
PUBLISHED_CLASSES = {"bird", "cat", "dog"}
PUBLISHED_IMAGES = 12_000  # of an epoch
PUBLISHED_NOTE = """\
The published figures are those of a PyTorch write-up, which trained on the original images of \
the same classes. Its accuracy is the score on the test images of a competition, its losses are \
from its own split of the images, and it was timed on a GPU.

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
        check_seeds(self.seeds)
        check_different("networks", self.networks, "networks")
        try:
            entries(self.networks, TrainSettings())
        except ValueError as error:
            raise ValueError(f"networks={','.join(self.networks)}: {error}") from error


def main(settings: Settings) -> None:
    """Compares, and prints how it goes."""
    compare(settings, make_console())


def compare(settings: Settings, console: Console) -> dict[str, Any]:
    """Trains what is not trained yet and writes the report; returns what `results.json` holds.

    Raises:
        OneLineError: if a setting or the data is wrong, or a training fails.
    """
    output = settings.output or Path("runs", f"compare-{settings.data.dataset}")
    check_runs_output(output, settings.data, "compare")
    base = TrainSettings(
        network=settings.network,
        data=settings.data,
        reading=settings.reading,
        training=settings.training,
    )
    chosen = entries(settings.networks, base)
    outcomes, diverged = run_all(chosen, settings.seeds, output, console, (PLAIN, MIRRORED))
    confusions = {
        o.label: np.sum([run.evaluations[PLAIN.name]["confusion"] for run in o.runs], axis=0)
        for o in outcomes
    }
    class_names = outcomes[0].runs[0].data["class_names"]
    command, shown = typed("compare", settings, RECIPES), table(outcomes, class_names)
    images = ", ".join(class_names) if settings.data.dataset == "folder" else settings.data.dataset
    results = {
        "command": command,
        "settings": dataclasses.asdict(settings.training),
        "written_with": machine.versions(),
        "networks": {o.label: [run.figures for run in o.runs] for o in outcomes},
    }
    pictures = {
        "curves": plots.curves({o.label: [run.metrics for run in o.runs] for o in outcomes}),
        "confusion": plots.confusion_matrices(confusions, class_names),
    }
    title = f"{' and '.join(settings.networks)} on {images}"
    described = text(outcomes, settings, shown, command)
    report.publish(output, title, described, pictures, results, [shown], console, diverged)
    return results


def table(outcomes: Sequence[Outcome], class_names: Sequence[str]) -> tables.Table:
    """The original's table with a column a network, and what it published for photographs of the
    same classes.

    Its seconds are left out where an epoch has another number of images.
    """
    columns = {outcome.label: column(outcome) for outcome in outcomes}
    photographs = outcomes[0].runs[0].summary["dataset"] != "silhouettes"
    if photographs and set(class_names) == PUBLISHED_CLASSES:
        images = outcomes[0].runs[0].summary["images"]["train"]
        other = () if images == PUBLISHED_IMAGES else (SECONDS,)
        columns |= {
            f"{label}, published": {k: v for k, v in PUBLISHED[label].items() if k not in other}
            for label, cells in columns.items()
            if label in PUBLISHED and cells["parameters"] == PUBLISHED[label]["parameters"]
        }
    rows = [
        [heading, *(cells.get(heading, "") for cells in columns.values())]
        for heading in column(outcomes[0])
    ]
    return ["", *columns], [row for row in rows if any(row[1:])]


def column(outcome: Outcome) -> dict[str, str]:
    """The figures of one network: mean ± standard deviation over its seeds."""
    first = outcome.runs[0].summary
    turns = [overfitting_epoch(run.metrics) for run in outcome.runs]
    of_many = all("best_val_top5_accuracy" in run.summary for run in outcome.runs)
    return {
        "parameters": f"{first['parameters']:,}",
        "multiply-adds": f"{first['multiply_adds']:,}",
        "overfitting epoch (validation loss)": ", ".join(str(turn or "none") for turn in turns),
        "lowest validation loss (train loss of that epoch)": (
            f"{outcome.spread('best_val_loss', '.4f')} "
            f"({outcome.spread('train_loss_at_best', '.4f')})"
        ),
        "validation accuracy, epoch of lowest loss": outcome.spread("val_accuracy_at_best", ".2%"),
        "the same, averaged over mirrored images": outcome.spread(
            f"plain_{MIRRORED.name}_accuracy", ".2%"
        ),
        "validation accuracy, last epoch": outcome.spread("final_val_accuracy", ".2%"),
        "highest validation accuracy of all epochs": outcome.spread("best_val_accuracy", ".2%"),
        TOP5: outcome.spread("best_val_top5_accuracy", ".2%") if of_many else "",
        "score in the competition": "",
        SECONDS: outcome.spread("seconds_per_epoch", ".2f"),
    }


def text(outcomes: Sequence[Outcome], settings: Settings, shown: tables.Table, command: str) -> str:
    """The report."""
    headings, rows = shown
    note = PUBLISHED_NOTE if len(headings) > len(outcomes) + 1 else ""
    seeds = ", ".join(map(str, settings.seeds))
    images = outcomes[0].runs[0].summary["images"]
    summaries = (run.summary for outcome in outcomes for run in outcome.runs)
    devices = " and ".join(sorted({each.get("device", "another machine") for each in summaries}))
    return f"""\
Each network was trained on {images["train"]:,} images for \
{tables.counted(settings.training.epochs, "epoch")}, from \
the seeds {seeds}, and measured on {images["validation"]:,} validation images after every epoch. \
The table shows the mean over the seeds ± the standard deviation. The train loss is the mean over \
the steps of an epoch, with the augmentation and the dropout of the recipe. A network overfits \
from the epoch of its lowest validation loss, averaged over five epochs, if that average later \
rises by 2 %; the table names this epoch for each seed. Epochs were chosen by the validation \
images, and nothing by any other images. The seconds are those of the training steps on {devices}.

{tables.table(headings, rows)}

{note}![losses and accuracies; the bands reach from the least to the greatest seed](curves.png)

![validation images, checkpoints of lowest validation loss, sum over the seeds](confusion.png)

```bash
{command}
```
"""


if __name__ == "__main__":
    run(main, Settings, "compare", RECIPES)
