"""How good a run's network is on a split of its images, measured and kept."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
from rich.console import Console

from chansel_jax.data import Split
from chansel_jax.files import write_json
from chansel_jax.networks.resnet import ResNet
from chansel_jax.training.prediction import Scores, make_predict, predict_all, scores
from experiments.cli.errors import CommandError
from experiments.training.compilation import counts_top5
from experiments.training.load import Checkpoint, Run, load_images
from experiments.training.typed_json import from_json


class Evaluation(TypedDict):
    """What `evaluation-NAME.json` holds; `scores` says what the figures are."""

    split: str
    epoch: int
    flip_average: bool
    images_sha256: str
    class_names: Sequence[str]
    loss: float
    accuracy: float
    precision: Sequence[float | None]
    recall: Sequence[float | None]
    confusion: Sequence[Sequence[int]]
    top5_accuracy: NotRequired[float]  # where the classes are many
    predictions: NotRequired[Sequence[int]]  # the class that each image is taken for; newer files


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which scores of a run.

    Attributes:
        split: of its images.
        checkpoint: whose parameters are taken.
        flip_average: whether over mirrored images too.
    """

    split: str
    checkpoint: Checkpoint = "best"
    flip_average: bool = False

    @property
    def name(self) -> str:
        """What its files are called after."""
        return f"{self.split}-flip-averaged" if self.flip_average else self.split


def measure(
    run: Run, wanted: Wanted, data_dir: Path | None, output: Path, console: Console
) -> tuple[Scores, Split]:
    """Measures and prints the scores of a run, and writes them to `evaluation-NAME.json`.

    Args:
        run: with the parameters of the wanted checkpoint.
        wanted: which scores.
        data_dir: as in `Settings`.
        output: the folder of the file.
        console: takes the progress.

    Returns:
        The scores, and the images that they are of.

    Raises:
        CommandError: if the images cannot be had, or there is no such split.
    """
    dataset, others = load_images(run, data_dir)
    if wanted.split not in dataset.splits:
        raise CommandError(
            f"split={wanted.split}: the data set {dataset.name} has {', '.join(dataset.splits)} "
            "only"
        )
    if wanted.split in others:
        console.print(f"note: the {wanted.split} images are not those of the run")
    images = dataset.splits[wanted.split]
    found = scores_of(run.network, run, images, wanted.flip_average)
    top5 = {"top5_accuracy": found.top5_accuracy} if counts_top5(len(run.class_names)) else {}
    console.print(
        f"{wanted.name}, {len(images.labels):,} images, epoch {run.epoch}: "
        f"loss {found.loss:.4f}, accuracy {found.accuracy:.2%}"
        + "".join(f", top-5 accuracy {value:.2%}" for value in top5.values())
    )
    content: Evaluation = {
        "split": wanted.split,
        "epoch": run.epoch,
        "flip_average": wanted.flip_average,
        "images_sha256": images.summary.digest,
        "class_names": run.class_names,
        "loss": found.loss,
        "accuracy": found.accuracy,
        "precision": share_or_none(found.precision),
        "recall": share_or_none(found.recall),
        "confusion": found.confusion.tolist(),
        "predictions": found.predictions.tolist(),
        **top5,
    }
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / f"evaluation-{wanted.name}.json", content)
    return found, images


def evaluation_from(value: Any, name: str = "") -> Evaluation:
    """An evaluation from its JSON form; raises `ValueError` if it is none, as `from_json` does."""
    found = from_json(Evaluation, value, name)
    counts, classes = found["confusion"], len(found["class_names"])
    if {len(counts), *map(len, counts)} != {classes}:
        raise ValueError(f"{name or 'it'}: confusion must be {classes} × {classes} counts")
    return found


def scores_of(network: ResNet, run: Run, images: Split, flip_average: bool = False) -> Scores:
    """The scores of a network that takes images normalised as those of `run`."""
    predict = make_predict(network, run.mean, run.std, flip_average=flip_average)
    return scores(predict_all(predict, images.images), images.labels)


def share_or_none(values: np.ndarray) -> list[float | None]:
    """In plain Python; None where a class was never met, or never predicted."""
    return [None if np.isnan(value) else float(value) for value in values]
