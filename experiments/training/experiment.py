"""All that the settings of a training run decide, built: data, network, optimiser."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from chansel_jax import data, functional
from chansel_jax.data.dataset import first_of_each_class, with_random_labels
from chansel_jax.digest import digest
from chansel_jax.networks.resnet import ResNet
from chansel_jax.training import devices, step
from chansel_jax.training.distillation import Teacher
from experiments.cluster import coordination
from experiments.training.compilation import schedule_and_optimizer
from experiments.training.settings import (
    DataSettings,
    Settings,
    TrainingSettings,
    decisive,
    initial_network,
)


@dataclasses.dataclass(frozen=True)
class DataDescription:
    """What decides a run's result of its images: `data` in its `config.json`.

    Attributes:
        class_names: in the order of the labels.
        image_shape: `(H, W, 3)`.
        images: how many each split has.
        digests: of the images and labels of each split.
        mean: `(3,)`, the channels' means over the training images, whose pixels are from 0 to 255.
        std: `(3,)`, their standard deviations.

    Raises:
        ValueError: if a size, a mean or a standard deviation cannot be.
    """

    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    images: Mapping[str, int]
    digests: Mapping[str, str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self):
        if min(self.image_shape) < 1 or self.image_shape[2] != 3:
            raise ValueError(f"image_shape={self.image_shape} must be (height, width, 3)")
        if not all(0 <= value <= 255 for value in self.mean):
            raise ValueError(f"mean={self.mean} must be from 0 to 255")
        if not all(0 < value <= 255 for value in self.std):
            raise ValueError(f"std={self.std} must be above 0 and at most 255")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training run, ready to begin.

    Attributes:
        settings: what it was built from.
        dataset: its images, on the host.
        network: its structure, and its parameters before the first step.
        begins_with: a digest of those parameters where the seed alone does not decide them.
        schedule: the learning rate by update.
        optimizer: at that learning rate; it is called at every step.
        mesh: the devices.
        updates_per_epoch: whole batches.
        teacher: what the network learns from besides the labels.
        new_classifier: whether the parameters are others' but for those of the classifier.
    """

    settings: Settings
    dataset: data.Dataset
    network: ResNet
    begins_with: str | None
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    mesh: jax.sharding.Mesh
    updates_per_epoch: int
    teacher: Teacher | None = None
    new_classifier: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Parts of batches, if gradients are accumulated; else batches."""
        return self.updates_per_epoch * self.settings.training.accumulate

    @property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation `(C,)` of each channel of the training images."""
        summary = self.dataset.splits["train"].summary
        return summary.mean, summary.std

    def init_state(self) -> step.TrainState:
        """The state before the first step."""
        seed, ema = self.settings.seed, self.settings.training.ema > 0
        return step.init_state(self.network, self.optimizer, seed, self.mesh, ema=ema)

    def describe(self) -> dict[str, Any]:
        """All that decides the result: the settings, and the data's sizes and statistics."""
        splits = self.dataset.splits
        mean, std = self.statistics
        others = {"begins_with": self.begins_with, "teacher": describe_teacher(self.teacher)}
        described = DataDescription(
            class_names=self.dataset.class_names,
            image_shape=splits["train"].images.shape[1:],
            images={name: len(split.labels) for name, split in splits.items()},
            digests={name: split.summary.digest for name, split in splits.items()},
            mean=tuple(mean.tolist()),
            std=tuple(std.tolist()),
        )
        return {
            "settings": decisive(self.settings),
            **{name: value for name, value in others.items() if value},
            "data": dataclasses.asdict(described),
        }


def describe_teacher(teacher: Teacher | None) -> dict[str, Any] | None:
    """What of a teacher decides a run's result, as nested JSON."""
    if teacher is None:
        return None
    parameters = digest(functional.network_tree(teacher.network))
    return {"parameters_sha256": parameters, **dataclasses.asdict(teacher.distillation)}


def build(
    settings: Settings,
    network: ResNet | None = None,
    teacher: Teacher | None = None,
    class_names: Sequence[str] | None = None,
) -> Experiment:
    """Loads the data and builds what trains on it.

    Args:
        settings: of the run.
        network: with the parameters to begin with; by default they are initialised with
            `settings.seed`. Where its classes are others than the data's, the classifier is.
        teacher: what the network learns from besides the labels; it must have their classes.
        class_names: those of `network`; by default it has the data's, if it has as many.

    Raises:
        ValueError: if a setting is wrong, or the parameters are of another structure.
        DataError: if the data cannot be had.
        OtherProcessError: if they cannot be had in another process.
    """
    check_schedule(settings.training)
    in_memory = settings.reading.input == "memory"
    dataset = coordination.in_turn(lambda: load_data(settings.data, in_memory))
    recipe = settings.training
    check_sizes(recipe, dataset.splits["train"])
    updates_per_epoch = len(dataset.splits["train"].labels) // recipe.batch_size
    schedule, optimizer = schedule_and_optimizer(recipe, updates_per_epoch)
    mesh = devices.data_mesh()
    devices.check_batch_size(recipe.batch_size, mesh, recipe.accumulate)
    own = initial_network(settings, len(dataset.class_names))
    known = True
    if network is not None:
        known = network.config.num_classes == len(dataset.class_names)
        known = known and class_names in (None, dataset.class_names)
        try:
            take_parameters(own, network, with_classifier=known)
        except ValueError as error:
            name = f"init={settings.init}" if settings.init else "the network to begin with"
            raise ValueError(f"{name} does not fit: {error}") from error
    return Experiment(
        settings=settings,
        dataset=dataset,
        network=own,
        begins_with=network and digest(functional.network_tree(own)),
        schedule=schedule,
        optimizer=optimizer,
        mesh=mesh,
        updates_per_epoch=updates_per_epoch,
        teacher=teacher,
        new_classifier=not known,
    )


def check_sizes(recipe: TrainingSettings, split: data.Split) -> None:
    """Raises `ValueError`, naming a setting, if training images are too few or too small for it."""
    count, smallest = len(split.labels), min(split.images.shape[1:3])
    if recipe.batch_size > count:
        raise ValueError(
            f"batch_size={recipe.batch_size} must be at most the {count} training images"
        )
    cutout, crop_padding = recipe.augmentation.cutout, recipe.augmentation.crop_padding
    if cutout >= smallest:
        raise ValueError(f"cutout={cutout} must be less than the {smallest} pixels of the images")
    if crop_padding > smallest:
        raise ValueError(
            f"crop_padding={crop_padding} must be at most the {smallest} pixels of the images"
        )


def take_parameters(network: ResNet, other: ResNet, *, with_classifier: bool) -> None:
    """Gives `network`, in place, the parameters and statistics of `other`.

    Raises:
        ValueError: naming the first array that is not of the same shape in both.
    """
    trees = [functional.network_tree(each) for each in (network, other)]
    if not with_classifier:
        for tree in trees:
            del tree["params"]["classifier"]
    here, there = (
        {
            jax.tree_util.keystr(path[1:], simple=True, separator="."): jnp.shape(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in trees
    )
    for name in (*here, *there):
        if here.get(name) != there.get(name):
            own, others = (
                f"of shape {shapes[name]}" if name in shapes else "missing"
                for shapes in (here, there)
            )
            raise ValueError(f"{name} is {own} in this network and {others} there")
    nnx.update(network, *trees[1].values())


def check_schedule(recipe: TrainingSettings) -> None:
    """Raises `ValueError` if a learning rate that is to fall in steps would never fall."""
    steps = recipe.optimization.step_epochs
    if recipe.optimization.schedule == "step" and steps and steps[0] >= recipe.epochs:
        raise ValueError(
            f"step_epochs={','.join(map(str, steps))} must begin before epochs={recipe.epochs}, or "
            "the learning rate never falls"
        )


def load_data(settings: DataSettings, in_memory: bool = True) -> data.Dataset:
    """The images that `settings` name, in memory or where they are stored.

    Raises:
        DataError: if they cannot be had.
    """
    arguments = dataclasses.asdict(settings)
    wanted = {name: arguments.pop(f"{name}_images") for name in ("train", "validation")}
    random_labels = arguments.pop("random_labels")
    dataset = data.load(arguments.pop("dataset"), **arguments, in_memory=in_memory)
    few = {
        name: first_of_each_class(dataset.splits[name], count, name)
        for name, count in wanted.items()
        if count is not None
    }
    splits = dataset.splits | few
    if random_labels:
        splits["train"] = with_random_labels(splits["train"], settings.split_seed)
    return dataclasses.replace(dataset, splits=splits)
