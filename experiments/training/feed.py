"""How the images reach the training step: from the devices' memory, or read as they are needed."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from chansel_jax.functional import network_tree
from chansel_jax.training import devices, streaming
from chansel_jax.training.batches import Batch, GivenOrder, TrainingOrder, take
from chansel_jax.training.step import Totals, TrainState, init_totals
from experiments.training.compilation import compiled, counts_top5, what_compilation_needs
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


@contextlib.contextmanager
def open_feed(experiment: Experiment, state: TrainState) -> Iterator[Feed]:
    """The images of a run that goes on from `state`, within a `with`."""
    mesh, settings = experiment.mesh, experiment.settings
    size, reading = settings.training.images_per_step, settings.reading
    teacher = experiment.teacher
    splits = {name: experiment.dataset.splits[name] for name in ("train", "validation")}
    counts = {name: len(split.labels) for name, split in splits.items()}
    statistics = devices.replicate(experiment.statistics, mesh)
    step, add = compiled(
        what_compilation_needs(settings),
        len(experiment.dataset.class_names),
        splits["train"].images.shape[1:],
        experiment.updates_per_epoch,
        mesh,
        teacher,
    )
    of_teacher = () if teacher is None else (network_tree(teacher.network),)
    of_run = *statistics, *devices.replicate(of_teacher, mesh)
    order = TrainingOrder(np.asarray(state.key), counts["train"], size, experiment.steps_per_epoch)
    steps = range(int(state.step), experiment.steps_per_epoch * settings.training.epochs)
    given = GivenOrder(counts["validation"], size)
    if reading.input == "memory":
        on_devices = {
            name: devices.replicate(Batch(split.images, split.labels), mesh)
            for name, split in splits.items()
        }

    def batches(name, order, steps, workers=0):
        if reading.input == "memory":  # every device gathers those of each batch
            numbers = (devices.replicate(order(n), mesh) for n in steps)
            return contextlib.nullcontext(take(on_devices[name], n, mesh) for n in numbers)
        return streaming.read_batches(splits[name], order, mesh, steps, workers)

    def evaluate(state):
        classes = len(experiment.dataset.class_names)
        totals = init_totals(mesh, top5=counts_top5(classes))
        with batches("validation", given, range(len(given))) as validation:
            for number, batch in enumerate(validation):
                totals = add(state, totals, batch, given.new(number), *statistics)
        return totals

    with batches("train", order, steps, reading.workers) as training:
        yield Feed(training, lambda *arguments: step(*arguments, *of_run), evaluate)
