"""Runs that experiments.train has left, loaded again."""

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from chansel_jax import data
from chansel_jax.networks.resnet import ResNet
from chansel_jax.training.checkpoint import restore_network
from experiments.cli.errors import CommandError
from experiments.training.experiment import load_data
from experiments.training.settings import DataSettings, Settings, build_network
from experiments.training.workdir import DATA_DIR

Checkpoint = int | Literal["best", "last"]


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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CommandError(f"{what} cannot be read ({type(error).__name__}: {error})") from error


def load_run(workdir: Path, epoch: Checkpoint = "best") -> Run:
    """The run in `workdir` with the parameters of the checkpoint of `epoch`.

    Raises:
        CommandError: if there is none, or its `config.json` cannot be read.
        CheckpointError: if there is no such checkpoint, or it cannot be restored.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise CommandError(f"workdir={workdir} holds no run: there is no {path}")
    with readable(path):
        config = json.loads(path.read_text())
        settings, images = settings_from(Settings, config["settings"]), config["data"]
        if DATA_DIR in config and (data_dir := Path(config[DATA_DIR])).is_dir():
            of_data = dataclasses.replace(settings.data, data_dir=data_dir)
            settings = dataclasses.replace(settings, data=of_data)
        network = build_network(settings, len(images["class_names"]))
        described = {
            "settings": settings,
            "class_names": tuple(images["class_names"]),
            "image_shape": tuple(images["image_shape"]),
            "digests": images["digests"],
            "mean": np.asarray(images["mean"], np.float32),
            "std": np.asarray(images["std"], np.float32),
        }
    epoch = restore_network(workdir / "checkpoints", network, epoch)
    return Run(workdir, network, epoch, **described)


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


def settings_from(settings_type: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of settings from its JSON form; what is missing is as by default.

    Raises:
        ValueError: if a value is refused, or there is one that the dataclass does not have.
    """
    hints = typing.get_type_hints(settings_type)
    unknown = set(values) - set(hints)
    if unknown:
        raise ValueError(f"{settings_type.__name__} has no {', '.join(sorted(unknown))}")
    return settings_type(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return settings_from(hint, value)
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is not None and Path in choices:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
