"""How good a trained network is, class by class.

python -m experiments.evaluate --workdir=RUN
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from chansel_jax import records
from chansel_jax.inference import make_predict, predict_all
from chansel_jax.metrics import Scores, scores
from experiments import figures
from experiments.command_line import CommandError, make_output, run
from experiments.printing import LAYOUT
from experiments.runs import Checkpoint, Run, load_images, load_run

BATCH_SIZE = 250


@dataclasses.dataclass(frozen=True)
class Settings:
    """Loss, accuracy, precision and recall of a run's network, and its confusion matrix."""

    workdir: Path
    """The run's folder."""
    split: Literal["train", "validation", "test"] = "validation"
    """Of the run's images."""
    data_dir: Path | None = None
    """As in experiments.train; the folder of images, where the run's were one."""
    epoch: Checkpoint = "best"
    """The checkpoint: that of lowest validation loss, the last one, or that of an epoch that was
    kept."""
    flip_average: bool = False
    """Average the probabilities of every image and its mirror image."""
    output: Path | None = None
    """Folder of evaluation-SPLIT.json and confusion-SPLIT.png; by default the run's."""


def main(settings: Settings) -> None:
    """Evaluates the run and prints what comes out."""
    evaluate(settings, Console(highlight=False, soft_wrap=True))


def evaluate(settings: Settings, console: Console) -> Scores:
    """Evaluates, prints, and writes both files.

    Raises:
        CommandError: if the run or the images cannot be had, or there is no such split.
    """
    trained = load_run(settings.workdir, settings.epoch)
    found = score(trained, settings.split, settings.data_dir, settings.flip_average, console)
    output = settings.output or settings.workdir
    make_output(output)
    print_scores(found, trained, console)
    write_scores(output, found, trained, settings.split, settings.flip_average)
    title = f"{settings.split}, epoch {trained.epoch}, {found.accuracy:.2%}"
    picture = output / f"confusion-{settings.split}.png"
    figures.save(figures.confusion_matrices({title: found.confusion}, trained.class_names), picture)
    console.print(f"written to {output}", markup=False)
    return found


def recorded_scores(
    workdir: Path,
    split: str,
    checkpoint: Literal["best", "last"],
    data_dir: Path | None,
    console: Console,
) -> Mapping[str, Any]:
    """What `evaluation-SPLIT.json` holds, for a checkpoint of a finished run; measured if needed.

    Args:
        workdir: the run's folder; its checkpoints may be gone if the file is there.
        split: of its images.
        checkpoint: that of lowest validation loss, or the last one.
        data_dir: as in `Settings`.
        console: takes the progress.

    Raises:
        CommandError: as `score`.
    """
    summary = json.loads((workdir / "summary.json").read_text())
    epoch = summary["best_epoch" if checkpoint == "best" else "epochs"]
    path = workdir / scores_name(split)
    if path.is_file():
        recorded = json.loads(path.read_text())
        if recorded["epoch"] == epoch and not recorded["flip_average"]:
            return recorded
    trained = load_run(workdir, checkpoint)
    console.print(f"{workdir.name}: ", end="", markup=False)
    found = score(trained, split, data_dir, False, console)
    write_scores(workdir, found, trained, split, False)
    return json.loads(path.read_text())


def scores_name(split: str) -> str:
    """The file of the scores."""
    return f"evaluation-{split}.json"


def write_scores(folder: Path, found: Scores, trained: Run, split: str, flip_average: bool) -> None:
    """Writes the scores as JSON, with what they were measured on."""
    content = {
        "split": split,
        "epoch": trained.epoch,
        "flip_average": flip_average,
        "class_names": trained.class_names,
        **as_json(found),
    }
    records.write_json(folder / scores_name(split), content)


def score(
    trained: Run, split: str, data_dir: Path | None, flip_average: bool, console: Console
) -> Scores:
    """The scores of a run's network on one split of its images.

    Raises:
        CommandError: if the images cannot be had, or there is no such split.
    """
    dataset, others = load_images(trained, data_dir)
    if split not in dataset.splits:
        raise CommandError(
            f"split={split}: the data set {dataset.name} has {', '.join(dataset.splits)} only"
        )
    if split in others:
        console.print(f"note: the {split} images are not those of the run")
    images = dataset.splits[split]
    predict = make_predict(
        trained.network,
        trained.mean,
        trained.std,
        batch_size=min(BATCH_SIZE, len(images.labels)),
        flip_average=flip_average,
    )
    found = scores(predict_all(predict, images.images, BATCH_SIZE), images.labels)
    console.print(
        f"{split}, {len(images.labels):,} images, epoch {trained.epoch}: "
        f"loss {found.loss:.4f}, accuracy {found.accuracy:.2%}"
    )
    return found


def print_scores(found: Scores, trained: Run, console: Console) -> None:
    """A row a class: precision, recall, and what its images were taken for."""
    table = Table(title="rows: the class; columns on the right: taken for", **LAYOUT)
    table.add_column("class")
    for heading in ("images", "precision", "recall", *trained.class_names):
        table.add_column(heading, justify="right")
    for i, name in enumerate(trained.class_names):
        counts = found.confusion[i]
        shares = (f"{value:.2%}" for value in (found.precision[i], found.recall[i]))
        table.add_row(name, f"{counts.sum():,}", *shares, *(f"{count:,}" for count in counts))
    console.print(table)


def as_json(found: Scores) -> dict[str, Any]:
    """The scores in plain Python."""
    return {
        "loss": found.loss,
        "accuracy": found.accuracy,
        "precision": found.precision.tolist(),
        "recall": found.recall.tolist(),
        "confusion": found.confusion.tolist(),
    }


if __name__ == "__main__":
    run(main, Settings, "evaluate")
