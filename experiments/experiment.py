"""All that the settings of a training run decide, built: data, network, optimiser, functions."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from chansel_jax import data, training
from chansel_jax.optimizer import accumulated, make_optimizer, make_schedule
from chansel_jax.resnet import ResNet
from experiments import cluster
from experiments.settings import DataSettings, Settings, build_network, decisive


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training run, ready to begin.

    Attributes:
        settings: what it was built from.
        dataset: its images, on the host.
        network: its structure, and its parameters before the first step.
        begins_with: a digest of those parameters where the seed does not decide them.
        schedule: the learning rate by update.
        optimizer: at that learning rate; it is called at every step.
        mesh: the devices.
        splits: `"train"` and `"validation"` on the devices.
        updates_per_epoch: whole batches.
        steps_per_epoch: their parts, if gradients are accumulated; else the same.
        step: the jitted training step.
        evaluate: the jitted evaluation.
    """

    settings: Settings
    dataset: data.Dataset
    network: ResNet
    begins_with: str | None
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    mesh: jax.sharding.Mesh
    splits: dict[str, training.DeviceSplit]
    updates_per_epoch: int
    steps_per_epoch: int
    step: Callable
    evaluate: Callable

    def init_state(self) -> training.TrainState:
        """The state before the first step."""
        return training.init_state(self.network, self.optimizer, self.settings.seed, self.mesh)

    def describe(self) -> dict[str, Any]:
        """All that decides the result: the settings, and the data's sizes and statistics."""
        train_split = self.splits["train"]
        sizes = {name: len(split.labels) for name, split in self.dataset.splits.items()}
        begins_with = {"begins_with": self.begins_with} if self.begins_with else {}
        return {
            "settings": decisive(self.settings),
            **begins_with,
            "data": {
                "class_names": self.dataset.class_names,
                "image_shape": train_split.images.shape[1:],
                "images": sizes,
                "digests": {name: digest(split) for name, split in self.dataset.splits.items()},
                "mean": train_split.mean.tolist(),
                "std": train_split.std.tolist(),
            },
        }


def build(settings: Settings, network: ResNet | None = None) -> Experiment:
    """Loads the data and builds what trains on it.

    Args:
        settings: of the run.
        network: with the parameters to begin with, and of the structure that `settings` describe;
            by default one that is initialised with `settings.seed`.

    Raises:
        ValueError: if a setting or the data is wrong.
        CommandError: if they are so in another process.
    """
    dataset = cluster.in_turn(lambda: load_data(settings.data))
    train_split = dataset.splits["train"]
    recipe = settings.training
    updates_per_epoch = len(train_split.labels) // recipe.batch_size
    if not updates_per_epoch:
        raise ValueError(
            f"batch_size={recipe.batch_size} must be at most the {len(train_split.labels)} "
            "training images"
        )
    schedule = make_schedule(
        recipe.optimization, epochs=recipe.epochs, steps_per_epoch=updates_per_epoch
    )
    optimizer = accumulated(make_optimizer(recipe.optimization, schedule), recipe.accumulate)
    mesh = training.data_mesh()
    training.check_batch_size(recipe.batch_size, mesh, recipe.accumulate)
    images_per_step = recipe.batch_size // recipe.accumulate
    steps_per_epoch = updates_per_epoch * recipe.accumulate
    built = network or build_network(settings, len(dataset.class_names))
    step = training.make_train_step(
        built,
        optimizer,
        mesh=mesh,
        batch_size=images_per_step,
        steps_per_epoch=steps_per_epoch,
        augmentation=recipe.augmentation,
        label_smoothing=recipe.label_smoothing,
    )
    statistics = training.channel_statistics(train_split.images)
    return Experiment(
        settings=settings,
        dataset=dataset,
        network=built,
        begins_with=network and training.digest(training.network_tree(network)),
        schedule=schedule,
        optimizer=optimizer,
        mesh=mesh,
        splits={
            name: training.put_split(dataset.splits[name], *statistics, mesh)
            for name in ("train", "validation")
        },
        updates_per_epoch=updates_per_epoch,
        steps_per_epoch=steps_per_epoch,
        step=step,
        evaluate=training.make_evaluate(built, mesh=mesh, batch_size=images_per_step),
    )


def load_data(settings: DataSettings) -> data.Dataset:
    """The images that `settings` name.

    Raises:
        ValueError: if they cannot be had.
    """
    arguments = dataclasses.asdict(settings)
    train_images = arguments.pop("train_images")
    dataset = data.load(arguments.pop("dataset"), **arguments)
    if train_images is None:
        return dataset
    few = first_of_each_class(dataset.splits["train"], train_images)
    return dataclasses.replace(dataset, splits=dataset.splits | {"train": few})


def first_of_each_class(split: data.Split, count: int) -> data.Split:
    """`count` images of `split` in its order, of each class as many, give or take one.

    Raises:
        ValueError: if there are fewer.
    """
    if count > len(split.labels):
        raise ValueError(
            f"train_images={count} must be at most the {len(split.labels)} training images"
        )
    # How many images of its class come before each.
    ranks = np.zeros(len(split.labels), np.int64)
    for label in np.unique(split.labels):
        of_label = split.labels == label
        ranks[of_label] = np.arange(of_label.sum())
    chosen = np.sort(np.argsort(ranks, kind="stable")[:count])
    return data.Split(split.images[chosen], split.labels[chosen])


def digest(split: data.Split) -> str:
    """Of the images and labels, in order."""
    return training.digest((split.images, split.labels))
