"""How the images reach the training step: from the devices' memory, or read as they are needed."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from chansel_jax.training import devices, streaming
from chansel_jax.training.step import (
    Batch,
    Totals,
    TrainState,
    epoch_order,
    init_totals,
    make_batch_evaluate,
    make_batch_step,
    make_evaluate,
    make_train_step,
    put_split,
)
from experiments.training.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Feed:
    """The images of a run, with the functions that take them.

    Attributes:
        step: `(state, totals, *arguments) -> (state, totals)`, compiled; it consumes the state.
        arguments: of the steps that are left in the epoch of a state.
        evaluate: the validation totals of a state.
    """

    step: Callable[..., tuple[TrainState, Totals]]
    arguments: Callable[[TrainState], Iterator[tuple]]
    evaluate: Callable[[TrainState], Totals]


def open_feed(experiment: Experiment, state: TrainState) -> contextlib.AbstractContextManager[Feed]:
    """The images of a run that goes on from `state`, within a `with`."""
    in_memory = experiment.settings.reading.input == "memory"
    return (memory_feed if in_memory else streaming_feed)(experiment, state)


@contextlib.contextmanager
def memory_feed(experiment: Experiment, state: TrainState) -> Iterator[Feed]:
    """All images on every device; a step takes those that are next in the epoch's order."""
    train_split, validation = (
        put_split(experiment.dataset.splits[name], *experiment.statistics, experiment.mesh)
        for name in ("train", "validation")
    )

    def arguments(state):
        first = int(state.step)
        steps = experiment.steps_per_epoch
        order = epoch_order(state.key, first // steps, len(train_split.labels))
        for _ in range(first % steps, steps):
            yield train_split, order

    step = make_train_step(
        experiment.network,
        experiment.optimizer,
        batch_size=experiment.images_per_step,
        steps_per_epoch=experiment.steps_per_epoch,
        **experiment.step_options(),
    )
    evaluate = make_evaluate(
        experiment.network, mesh=experiment.mesh, batch_size=experiment.images_per_step
    )
    totals = init_totals(experiment.mesh)
    order = epoch_order(state.key, 0, len(train_split.labels))
    step = step.lower(state, totals, train_split, order).compile()
    evaluate = evaluate.lower(state, validation).compile()
    yield Feed(step, arguments, lambda state: evaluate(state, validation))


@contextlib.contextmanager
def streaming_feed(experiment: Experiment, state: TrainState) -> Iterator[Feed]:
    """Batches that Grain reads ahead, in the order of the other feed."""
    splits, mesh = experiment.dataset.splits, experiment.mesh
    size, steps = experiment.images_per_step, experiment.steps_per_epoch
    statistics = devices.replicate(experiment.statistics, mesh)
    order = streaming.TrainingOrder(np.asarray(state.key), len(splits["train"].labels), size, steps)
    step = make_batch_step(experiment.network, experiment.optimizer, **experiment.step_options())
    count = make_batch_evaluate(experiment.network, mesh=mesh)
    totals = init_totals(mesh)
    batch = abstract_batch(splits["train"].images.shape[1:], size, mesh)
    step = step.lower(state, totals, batch, *statistics).compile()
    mask = jax.ShapeDtypeStruct((size,), bool, sharding=devices.batch_sharding(mesh))
    count = count.lower(state, totals, batch, mask, *statistics).compile()

    def evaluate(state):
        totals = init_totals(mesh)
        with streaming.evaluation_batches(splits["validation"], mesh, size) as batches:
            for batch, mask in batches:
                totals = count(state, totals, batch, mask, *statistics)
        return totals

    with streaming.training_batches(
        splits["train"],
        order,
        mesh,
        first_step=int(state.step),
        steps=steps * experiment.settings.training.epochs,
        workers=experiment.settings.reading.workers,
    ) as batches:

        def arguments(state):
            for _ in range(int(state.step) % steps, steps):
                yield next(batches), *statistics

        yield Feed(step, arguments, evaluate)


def abstract_batch(image_shape: tuple[int, ...], size: int, mesh: jax.sharding.Mesh) -> Batch:
    """The shapes of a batch, to compile for."""
    sharding = devices.batch_sharding(mesh)
    return Batch(
        jax.ShapeDtypeStruct((size, *image_shape), np.uint8, sharding=sharding),
        jax.ShapeDtypeStruct((size,), np.int32, sharding=sharding),
    )
