"""How the images reach the training step: from the devices' memory, or read as they are needed."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from chansel_jax.training import devices, streaming
from chansel_jax.training.batches import Batch, GivenOrder, TrainingOrder, take
from chansel_jax.training.step import (
    Totals,
    TrainState,
    init_totals,
    make_evaluate,
    make_train_step,
)
from experiments.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Feed:
    """The images of a run, with the functions that take them.

    Attributes:
        batches: of the steps that are left of the run.
        step: `(state, totals, batch) -> (state, totals)`, compiled; it consumes the state.
        evaluate: the validation totals of a state.
    """

    batches: Iterator[Batch]
    step: Callable[[TrainState, Totals, Batch], tuple[TrainState, Totals]]
    evaluate: Callable[[TrainState], Totals]


# The batches of the steps that are left, and a function that opens all of the validation images,
# each batch with how many images are new in it.
Batches = tuple[
    Iterator[Batch], Callable[[], contextlib.AbstractContextManager[Iterator[tuple[Batch, int]]]]
]


@contextlib.contextmanager
def open_feed(experiment: Experiment, state: TrainState) -> Iterator[Feed]:
    """The images of a run that goes on from `state`, within a `with`."""
    mesh, size = experiment.mesh, experiment.images_per_step
    statistics = devices.replicate(experiment.statistics, mesh)
    step = make_train_step(experiment.network, experiment.optimizer, **experiment.step_options())
    add = make_evaluate(experiment.network, mesh=mesh)
    totals = init_totals(mesh)
    batch = abstract_batch(experiment.dataset.splits["train"].images.shape[1:], size, mesh)
    step = step.lower(state, totals, batch, *statistics).compile()
    add = add.lower(state, totals, batch, np.int32(size), *statistics).compile()
    in_memory = experiment.settings.reading.input == "memory"
    opened = (batches_in_memory if in_memory else batches_read_ahead)(experiment, state)
    with opened as (batches, validation):

        def evaluate(state):
            totals = init_totals(mesh)
            with validation() as batches:
                for batch, count in batches:
                    totals = add(state, totals, batch, count, *statistics)
            return totals

        yield Feed(batches, lambda *arguments: step(*arguments, *statistics), evaluate)


@contextlib.contextmanager
def batches_in_memory(experiment: Experiment, state: TrainState) -> Iterator[Batches]:
    """All images on every device, which gathers those of each batch."""
    mesh, splits = experiment.mesh, experiment.dataset.splits
    train, validation = (
        devices.replicate(Batch(splits[name].images, splits[name].labels), mesh)
        for name in ("train", "validation")
    )
    order, steps = training_order(experiment, state)
    given = GivenOrder(len(validation.labels), experiment.images_per_step)

    def validation_batches():
        batches = ((take(validation, given(n), mesh), given.new(n)) for n in range(len(given)))
        return contextlib.nullcontext(batches)

    yield (take(train, order(step), mesh) for step in steps), validation_batches


@contextlib.contextmanager
def batches_read_ahead(experiment: Experiment, state: TrainState) -> Iterator[Batches]:
    """The same, which Grain reads."""
    mesh, splits = experiment.mesh, experiment.dataset.splits
    order, steps = training_order(experiment, state)
    workers = experiment.settings.reading.workers
    with streaming.training_batches(splits["train"], order, mesh, steps, workers) as batches:
        yield (
            batches,
            lambda: streaming.evaluation_batches(splits["validation"], mesh, order.batch_size),
        )


def training_order(experiment: Experiment, state: TrainState) -> tuple[TrainingOrder, range]:
    """Which images each step takes, and the steps that are left of the run."""
    order = TrainingOrder(
        np.asarray(state.key),
        len(experiment.dataset.splits["train"].labels),
        experiment.images_per_step,
        experiment.steps_per_epoch,
    )
    all_steps = experiment.steps_per_epoch * experiment.settings.training.epochs
    return order, range(int(state.step), all_steps)


def abstract_batch(image_shape: tuple[int, ...], size: int, mesh: jax.sharding.Mesh) -> Batch:
    """The shapes of a batch, to compile for."""
    sharding = devices.batch_sharding(mesh)
    return Batch(
        jax.ShapeDtypeStruct((size, *image_shape), np.uint8, sharding=sharding),
        jax.ShapeDtypeStruct((size,), np.int32, sharding=sharding),
    )
