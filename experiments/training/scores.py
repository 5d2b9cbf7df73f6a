"""How good a run's network is on a split of its images, measured and kept."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from chansel_jax.data import Split
from chansel_jax.files import write_json
from chansel_jax.networks.resnet import ResNet
from chansel_jax.training.prediction import Scores, make_predict, predict_all, scores
from experiments.cli.errors import CommandError
from experiments.training.load import Config, Run, load_images, load_run, read_config, read_records


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
    write_json(folder / scores_name(stem(split, flip_average)), content)


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


def as_json(found: Scores) -> dict[str, Any]:
    """The scores in plain Python; None where a class was never met, or never predicted."""
    return {
        "loss": found.loss,
        "accuracy": found.accuracy,
        "precision": share_or_none(found.precision),
        "recall": share_or_none(found.recall),
        "confusion": found.confusion.tolist(),
    }


def share_or_none(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]
