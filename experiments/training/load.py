"""Runs that experiments.train has left, loaded again."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chansel_jax import data
from chansel_jax.files import read_json
from chansel_jax.networks.resnet import ResNet
from chansel_jax.training.checkpoint import restore_network
from experiments.cli.errors import CommandError
from experiments.training.experiment import DataDescription, load_data
from experiments.training.settings import (
    DataSettings,
    Settings,
    build_network,
    in_todays_names,
)
from experiments.training.typed_json import from_json

Checkpoint = int | Literal["best", "last"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What `config.json` of a run holds.

    Attributes:
        settings: all that decide its result.
        data: likewise.
        begins_with: a digest of the parameters before the first step, where the seed does not
            decide them.
        teacher: a digest of the parameters of a network that it learned from, and how much that one
            counts; None if there was none.
        data_dir: where the images lay when it was last trained.
    """

    settings: Settings
    data: DataDescription
    begins_with: str | None = None
    teacher: Mapping[str, Any] | None = None
    data_dir: Path | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained network, and what belongs to it.

    Attributes:
        workdir: the run's folder.
        network: with the parameters of one checkpoint.
        epoch: of that checkpoint.
        settings: all of them, with where its images lie if that is known and they still do.
        class_names: of the logits.
        image_shape: `(H, W, C)`.
        digests: of the images of each split.
        mean: `(C,)`, the channels' means over its training images.
        std: `(C,)`, their standard deviations.
    """

    workdir: Path
    network: ResNet
    epoch: int
    settings: Settings
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    digests: Mapping[str, str]
    mean: np.ndarray
    std: np.ndarray


@contextlib.contextmanager
def readable(what: object) -> Iterator[None]:
    """Within it, an error of reading `what` becomes a `CommandError`, one line that names it."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise CommandError(f"{what} cannot be read ({error})") from error


def load_run(
    workdir: Path, epoch: Checkpoint = "best", report: Callable[[str], object] = warnings.warn
) -> Run:
    """The run in `workdir` with the parameters of the checkpoint of `epoch`.

    Args:
        workdir: the run's folder.
        epoch: as in `restore_network`.
        report: likewise.

    Raises:
        CommandError: if there is none, or its `config.json` cannot be read.
        CheckpointError: if there is no such checkpoint, or it cannot be restored.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise CommandError(f"workdir={workdir} holds no run: there is no {path}")
    with readable(path):
        config = from_json(Config, in_todays_names(read_json(path)))
        network = build_network(config.settings, len(config.data.class_names))
    settings, images = config.settings, config.data
    if config.data_dir and config.data_dir.is_dir():
        of_data = dataclasses.replace(settings.data, data_dir=config.data_dir)
        settings = dataclasses.replace(settings, data=of_data)
    return Run(
        workdir,
        network,
        restore_network(workdir / "checkpoints", network, epoch, report),
        settings,
        class_names=images.class_names,
        image_shape=images.image_shape,
        digests=images.digests,
        mean=np.asarray(images.mean, np.float32),
        std=np.asarray(images.std, np.float32),
    )


def data_settings(run: Run, data_dir: Path | None) -> DataSettings:
    """Those of `run`, whose images lie in `data_dir`, by default where they lay."""
    settings = run.settings.data
    return dataclasses.replace(settings, data_dir=data_dir or settings.data_dir)


def load_images(run: Run, data_dir: Path | None) -> tuple[data.Dataset, tuple[str, ...]]:
    """The images of `run`, and the splits whose images are not those it was trained with.

    They stay on disk: most of them may never be looked at.

    Raises:
        DataError: if they cannot be had.
        CommandError: if they are of other classes.
    """
    settings = data_settings(run, data_dir)
    dataset = load_data(settings, in_memory=False)
    if dataset.class_names != run.class_names:
        raise CommandError(
            f"data_dir={settings.data_dir} has the classes {', '.join(dataset.class_names)}, the "
            f"run in {run.workdir} has {', '.join(run.class_names)}"
        )
    splits = dataset.splits.items()
    others = tuple(name for name, split in splits if split.summary.digest != run.digests.get(name))
    return dataset, others
