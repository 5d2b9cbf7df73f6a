"""The compiled functions of a run; runs in one process that differ in their seeds share them."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from chansel_jax.training import devices
from chansel_jax.training.batches import Batch
from chansel_jax.training.distillation import Teacher
from chansel_jax.training.optimizer import accumulated, make_optimizer, make_schedule
from chansel_jax.training.step import (
    abstract_state,
    abstract_tree,
    init_totals,
    make_evaluate,
    make_train_step,
)
from experiments.training.settings import Settings, TrainingSettings, build_network


def schedule_and_optimizer(
    recipe: TrainingSettings, updates_per_epoch: int
) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """The learning rate by update, and the optimiser at that rate, called at every step."""
    schedule = make_schedule(
        recipe.optimization, epochs=recipe.epochs, steps_per_epoch=updates_per_epoch
    )
    optimizer = make_optimizer(recipe.optimization, schedule)
    return schedule, accumulated(optimizer, recipe.accumulate)


@functools.lru_cache(maxsize=4)
def compiled(
    settings: Settings,
    num_classes: int,
    image_shape: tuple[int, int, int],
    updates_per_epoch: int,
    mesh: Mesh,
    teacher: Teacher | None = None,
) -> tuple[Callable, Callable]:
    """What `make_train_step` and `make_evaluate` make, compiled.

    Args:
        settings: from `what_compilation_needs`.
        num_classes: of the network.
        image_shape: of the images `(H, W, C)`.
        updates_per_epoch: whole batches.
        mesh: the devices.
        teacher: of the training step, if it has one.
    """
    recipe = settings.training
    network = nnx.eval_shape(lambda: build_network(settings, num_classes))
    _, optimizer = schedule_and_optimizer(recipe, updates_per_epoch)
    state = abstract_state(network, optimizer, mesh, ema=recipe.ema > 0)
    totals, of_validation = init_totals(mesh), init_totals(mesh, top5=counts_top5(num_classes))
    size = recipe.images_per_step
    sharding = devices.batch_sharding(mesh)
    batch = Batch(
        jax.ShapeDtypeStruct((size, *image_shape), np.uint8, sharding=sharding),
        jax.ShapeDtypeStruct((size,), np.int32, sharding=sharding),
    )
    statistic = jax.ShapeDtypeStruct(
        image_shape[-1:], np.float32, sharding=devices.everywhere(mesh)
    )
    train_step = make_train_step(
        network,
        optimizer,
        mesh=mesh,
        augmentation=recipe.augmentation,
        label_smoothing=recipe.label_smoothing,
        teacher=teacher,
        ema=recipe.ema,
        accumulate=recipe.accumulate,
    )
    of_teacher = () if teacher is None else (abstract_tree(teacher.network, mesh),)
    evaluate = make_evaluate(network, mesh=mesh)
    return (
        train_step.lower(state, totals, batch, statistic, statistic, *of_teacher).compile(),
        evaluate.lower(state, of_validation, batch, np.int32(size), statistic, statistic).compile(),
    )


def counts_top5(num_classes: int) -> bool:
    """Whether so many classes are enough for the accuracy among the first five to say something."""
    return num_classes >= 10


def what_compilation_needs(settings: Settings) -> Settings:
    """The settings that compiled functions depend on; all others are the default ones."""
    return Settings(conv=settings.conv, network=settings.network, training=settings.training)
