"""Trains a network on images, saves it, and reports.

    python -m experiments.train --conv=chansel

trains channel selection on the embedded silhouettes. A run lives in its --workdir; the same
command, typed again, goes on where the run stopped.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from chansel_jax import checkpoint, records, training
from chansel_jax.counting import count_network
from chansel_jax.resnet import ResNet
from chansel_jax.workdir import WorkdirError, claim
from experiments import printing
from experiments.benchmarking import machine
from experiments.command_line import CommandError, run
from experiments.experiment import Experiment, build
from experiments.memory import hand_back_memory
from experiments.settings import RECIPES, Settings, run_name


def main(settings: Settings) -> None:
    """Trains as `settings` say, and prints how it goes."""
    train_and_evaluate(settings, Console(highlight=False, soft_wrap=True))


def train_and_evaluate(
    settings: Settings, console: Console, network: ResNet | None = None
) -> dict[str, Any]:
    """Trains, or goes on with, the run that `settings` describe; returns its summary.

    Args:
        settings: of the run.
        console: takes the progress.
        network: with the parameters to begin with, as in `build`.

    Raises:
        CommandError: if a setting or the data is wrong, the workdir holds another run, no
            checkpoint can be restored, or a loss is not finite.
    """
    workdir = settings.workdir or Path("runs", run_name(settings))
    refuse_workdir_among_images(workdir, settings)
    try:
        experiment = build(settings, network)
        aside = claim(workdir, experiment.describe(), settings.resume)
    except (ValueError, WorkdirError) as error:
        raise CommandError(error) from error
    printing.print_header(experiment.dataset, experiment.mesh.devices.ravel(), console)
    rows = count_network(experiment.network.config, experiment.splits["train"].images.shape[1:3])
    printing.print_layers(rows, f"{settings.network.model}, multiply-adds for one image", console)
    console.print(f"run: {workdir}" + (f" (the one before is now {aside})" if aside else ""))
    try:
        with checkpoint.open_checkpoints(workdir / "checkpoints", console.print) as manager:
            state, history = train(experiment, manager, workdir, console)
    except (checkpoint.CheckpointError, FloatingPointError) as error:
        raise CommandError(error) from error
    summary = {
        "model": settings.network.model,
        "conv": settings.conv,
        "dataset": settings.data.dataset,
        "seed": settings.seed,
        "device": device_name(),
        "images": {name: len(split.labels) for name, split in experiment.dataset.splits.items()},
        "parameters": sum(row.parameters for row in rows),
        "multiply_adds": sum(row.multiply_adds for row in rows),
        **records.summarise(history),
        "params_sha256": training.digest((state.params, state.batch_stats)),
    }
    records.write_json(workdir / "summary.json", summary)
    printing.print_summary(summary, workdir, console)
    return summary


def device_name() -> str:
    """What JAX computes on, as its maker calls it."""
    device = jax.devices()[0]
    return machine.cpu_name() if device.platform == "cpu" else device.device_kind


def refuse_workdir_among_images(workdir: Path, settings: Settings) -> None:
    """Raises `CommandError` if a run's files would become part of its own folder of images."""
    images = settings.data.data_dir
    if settings.data.dataset != "folder" or images is None:
        return
    if workdir.resolve().is_relative_to(images.resolve()):
        raise CommandError(f"--workdir={workdir} lies within the images of {images}")


def train(
    experiment: Experiment,
    manager: checkpoint.CheckpointManager,
    workdir: Path,
    console: Console,
) -> tuple[training.TrainState, list[records.Row]]:
    """Trains all epochs that are still to come; returns the last state and the whole history.

    Raises:
        CheckpointError: if there are checkpoints, and none can be restored.
        FloatingPointError: if a loss is not finite; earlier checkpoints stay.
    """
    settings = experiment.settings
    state, history = experiment.init_state(), []
    restored = checkpoint.restore_latest(manager, state, console.print)
    if restored is not None:
        state, history = restored[0], restored[1]["history"]
        console.print(f"resumed after epoch {len(history)} of {settings.training.epochs}")
    if len(history) < settings.training.epochs:
        # An older one would be that of another run.
        (workdir / "summary.json").unlink(missing_ok=True)
        step, evaluate = compile_functions(experiment, state, console)
        console.print(printing.EPOCH_HEADER)
    with records.MetricsWriter(workdir, history) as metrics:
        try:
            for epoch in range(len(history) + 1, settings.training.epochs + 1):
                state, row = train_epoch(experiment, epoch, step, evaluate, state, console)
                history.append(row)
                metrics.write(row)
                checkpoint.save(manager, epoch, state, {"history": history}, row["val_loss"])
                console.print(printing.epoch_line(history))
                hand_back_memory()
        finally:
            if history:
                records.plot_losses(history, workdir / "losses.png", run_name(settings))
    return state, history


def compile_functions(
    experiment: Experiment, state: training.TrainState, console: Console
) -> tuple[Callable, Callable]:
    """The training step and the evaluation, compiled."""
    splits = experiment.splits
    order = training.epoch_order(state, len(splits["train"].labels), experiment.steps_per_epoch)
    start = time.perf_counter()
    step = experiment.step.lower(
        state, training.init_totals(experiment.mesh), splits["train"], order
    ).compile()
    evaluate = experiment.evaluate.lower(state, splits["validation"]).compile()
    console.print(f"compiled in {time.perf_counter() - start:.1f} s")
    return step, evaluate


def train_epoch(
    experiment: Experiment,
    epoch: int,
    step: Callable,
    evaluate: Callable,
    state: training.TrainState,
    console: Console,
) -> tuple[training.TrainState, records.Row]:
    """One pass over the training images, then the evaluation; returns the state and the row.

    Raises:
        FloatingPointError: if a loss is not finite.
    """
    steps, split = experiment.steps_per_epoch, experiment.splits["train"]
    start = time.perf_counter()
    order = training.epoch_order(state, len(split.labels), steps)
    totals = training.init_totals(experiment.mesh)
    for _ in track(
        range(steps),
        description=f"epoch {epoch}",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        state, totals = step(state, totals, split, order)
    totals = jax.device_get(totals)
    seconds = time.perf_counter() - start
    if totals.bad_step != training.NO_STEP:
        raise FloatingPointError(not_finite("training loss", totals.bad_step, epoch))
    validation = jax.device_get(evaluate(state, experiment.splits["validation"]))
    row = {
        "epoch": epoch,
        "train_loss": float(totals.loss / totals.count),
        "train_accuracy": float(totals.correct / totals.count),
        "val_loss": float(validation.loss / validation.count),
        "val_accuracy": float(validation.correct / validation.count),
        "learning_rate": float(experiment.schedule(epoch * steps - 1)),
        "images_per_second": float(totals.count / seconds),
        "seconds": seconds,
    }
    if not math.isfinite(row["val_loss"]):
        raise FloatingPointError(not_finite("validation loss", epoch * steps - 1, epoch))
    return state, row


def not_finite(what: str, step: int, epoch: int) -> str:
    """The message for a loss that is not finite at `step`, counted from 0."""
    kept = f"the checkpoint of epoch {epoch - 1} is kept" if epoch > 1 else "nothing was saved yet"
    return (
        f"the {what} is not finite at step {step} (epoch {epoch}); {kept}; "
        "a lower --learning-rate may help"
    )


if __name__ == "__main__":
    run(main, Settings, "train", RECIPES)
