"""How good a trained network is, class by class.

python -m experiments.evaluate --workdir=RUN
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from chansel_jax import records
from chansel_jax.data import Split
from chansel_jax.inference import make_predict, predict_all
from chansel_jax.metrics import Scores, scores
from chansel_jax.resnet import ResNet
from experiments import figures
from experiments.command_line import CommandError, make_output, run
from experiments.printing import LAYOUT
from experiments.runs import (
    Checkpoint,
    Config,
    Run,
    load_images,
    load_run,
    read_config,
    read_records,
)


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
    """Folder of evaluation-SPLIT.json and confusion-SPLIT.png, with --flip-average
    evaluation-SPLIT-flip-averaged.json and so on; by default the run's."""


def main(settings: Settings) -> None:
    """Evaluates the run and prints what comes out."""
    evaluate(settings, Console(highlight=False, soft_wrap=True))


def evaluate(settings: Settings, console: Console) -> Scores:
    """Evaluates, prints, and writes both files.

    Raises:
        CommandError: if the run or the images cannot be had, or there is no such split.
    """
    trained = load_run(settings.workdir, settings.epoch)
    output = settings.output or settings.workdir
    make_output(output)
    found, images = score(
        trained, settings.split, settings.data_dir, settings.flip_average, console
    )
    print_scores(found, trained, console)
    write_scores(output, found, trained, settings.split, images, settings.flip_average)
    title = f"{settings.split}, epoch {trained.epoch}, {found.accuracy:.2%}"
    picture = output / f"confusion-{stem(settings.split, settings.flip_average)}.png"
    figures.save(figures.confusion_matrices({title: found.confusion}, trained.class_names), picture)
    console.print(f"written to {output}", markup=False)
    return found


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which scores of a run.

    Attributes:
        split: of its images.
        checkpoint: that of lowest validation loss, or the last one.
        flip_average: whether over mirrored images too.
    """

    split: str
    checkpoint: Literal["best", "last"] = "best"
    flip_average: bool = False

    @property
    def name(self) -> str:
        """What its files are called after."""
        return stem(self.split, self.flip_average)


def recorded_scores(
    workdir: Path, wanted: Wanted, data_dir: Path | None, console: Console
) -> Mapping[str, Any]:
    """What `evaluation-SPLIT.json` holds of a finished run; measured if needed.

    Args:
        workdir: the run's folder; its checkpoints may be gone if the file is there.
        wanted: which scores.
        data_dir: as in `Settings`.
        console: takes the progress.

    Raises:
        CommandError: as `score`, or if the run's records cannot be read.
    """
    summary = read_records(workdir).summary
    known = {
        "split": wanted.split,
        "epoch": summary["best_epoch" if wanted.checkpoint == "best" else "epochs"],
        "flip_average": wanted.flip_average,
        "images_sha256": read_config(workdir).digests.get(wanted.split),
    }
    path = workdir / scores_name(wanted.name)
    try:
        recorded = json.loads(path.read_text())
        if known.items() <= recorded.items():
            return recorded
    except (OSError, ValueError, AttributeError):
        pass  # measured anew
    trained = load_run(workdir, wanted.checkpoint)
    console.print(f"{workdir.name}: ", end="", markup=False)
    found, images = score(trained, wanted.split, data_dir, wanted.flip_average, console)
    write_scores(workdir, found, trained, wanted.split, images, wanted.flip_average)
    return json.loads(path.read_text())


def scores_name(name: str) -> str:
    """The file of the scores; `name` as `stem` returns it."""
    return f"evaluation-{name}.json"


def stem(split: str, flip_average: bool) -> str:
    """What files of scores are called after."""
    return f"{split}-flip-averaged" if flip_average else split


def write_scores(
    folder: Path, found: Scores, trained: Run, split: str, images: Split, flip_average: bool
) -> None:
    """Writes the scores as JSON, with what they were measured on."""
    content = {
        "split": split,
        "epoch": trained.epoch,
        "flip_average": flip_average,
        "images_sha256": images.summary.digest,
        "class_names": trained.class_names,
        **as_json(found),
    }
    records.write_json(folder / scores_name(stem(split, flip_average)), content)


def score(
    trained: Run, split: str, data_dir: Path | None, flip_average: bool, console: Console
) -> tuple[Scores, Split]:
    """The scores of a run's network on one split of its images, and that split.

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
    found = scores_of(trained.network, trained, images, flip_average)
    console.print(
        f"{stem(split, flip_average)}, {len(images.labels):,} images, epoch {trained.epoch}: "
        f"loss {found.loss:.4f}, accuracy {found.accuracy:.2%}"
    )
    return found, images


def scores_of(network: ResNet, config: Config, images: Split, flip_average: bool = False) -> Scores:
    """The scores of a network that takes images normalised as those of `config`."""
    predict = make_predict(network, config.mean, config.std, flip_average=flip_average)
    return scores(predict_all(predict, images.images), images.labels)


def print_scores(found: Scores, trained: Run, console: Console) -> None:
    """A row a class: precision, recall, and what its images were taken for."""
    table = Table(title="rows: the class; columns on the right: taken for", **LAYOUT)
    table.add_column("class")
    for heading in ("images", "precision", "recall", *trained.class_names):
        table.add_column(heading, justify="right")
    precision, recall = (_or_none(values) for values in (found.precision, found.recall))
    for i, name in enumerate(trained.class_names):
        counts = found.confusion[i]
        shares = ("–" if v is None else f"{v:.2%}" for v in (precision[i], recall[i]))
        table.add_row(name, f"{counts.sum():,}", *shares, *(f"{count:,}" for count in counts))
    console.print(table)


def as_json(found: Scores) -> dict[str, Any]:
    """The scores in plain Python; None where a class was never met, or never predicted."""
    return {
        "loss": found.loss,
        "accuracy": found.accuracy,
        "precision": _or_none(found.precision),
        "recall": _or_none(found.recall),
        "confusion": found.confusion.tolist(),
    }


def _or_none(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]


if __name__ == "__main__":
    run(main, Settings, "evaluate")
