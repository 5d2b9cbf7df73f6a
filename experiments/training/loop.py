"""The training loop: steps, evaluations and checkpoints, and how it stops and goes on."""

import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

import jax
from rich.console import Console

from chansel_jax.functional import not_finite_in
from chansel_jax.memory import hand_back_memory
from chansel_jax.training import checkpoint, step
from chansel_jax.training.processes import together
from experiments.cli.console import tracked
from experiments.cli.ending import noted_signals
from experiments.cli.errors import CommandError, Interrupted
from experiments.cluster import coordination
from experiments.training import feed as feeds
from experiments.training import printing, records
from experiments.training.compilation import counts_top5
from experiments.training.experiment import Experiment
from experiments.training.settings import title
from experiments.training.typed_json import from_json
from experiments.training.workdir import WorkdirError


class DivergedError(CommandError):
    """A loss or a parameter is not finite."""


class Saved(TypedDict):
    """The record in a checkpoint; within an epoch, with the seconds that it has taken so far."""

    history: Sequence[records.Row]
    seconds: NotRequired[float]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        state: after the last step.
        history: a row for each finished epoch.
        totals: of the epoch that is under way.
        seconds: that epoch has taken so far.
    """

    state: step.TrainState
    history: list[records.Row]
    totals: step.Totals
    seconds: float = 0.0


def train(experiment: Experiment, workdir: Path, console: Console) -> Progress:
    """Trains all that is still to come of the run in `workdir`.

    Raises:
        CheckpointError: if there are checkpoints, and none can be restored.
        WorkdirError: if the run is finished, but its checkpoints have been deleted.
        DivergedError: if a loss or a parameter is not finite; earlier checkpoints stay.
        Interrupted: after SIGINT or SIGTERM, when all is saved.
    """
    epochs = experiment.settings.training.epochs
    with (
        noted_signals(console.print) as signal_received,
        checkpoint.open_checkpoints(workdir, console.print) as checkpoints,
        coordination.ended_at_once_by_others(),
        contextlib.ExitStack() as opened,
    ):
        progress = restore(experiment, checkpoints, console)
        if len(progress.history) == epochs:
            files = workdir, progress.history, title(experiment.settings)
            coordination.first_alone(lambda: records.mend(*files))
            return progress
        coordination.first_alone(lambda: discard_results(workdir, progress))
        console.print("the steps are compiled, or read where an earlier start kept them …")
        start = time.perf_counter()
        feed = opened.enter_context(feeds.open_feed(experiment, progress.state))
        console.print(f"the steps are ready after {time.perf_counter() - start:.1f} s")
        record = opened.enter_context(
            records.recorded(workdir, progress.history, title(experiment.settings))
            if coordination.is_first()
            else contextlib.nullcontext(lambda row: None)
        )
        signal_to_any = coordination.shared_maximum(signal_received)
        between_steps = functools.partial(save_or_stop, experiment, checkpoints, signal_to_any)
        console.print(printing.epoch_header(counts_top5(len(experiment.dataset.class_names))))
        while len(progress.history) < epochs:
            progress = train_epoch(experiment, progress, feed, between_steps, console)
            row, saved = progress.history[-1], {"history": progress.history}
            together(functools.partial(record, row))
            checkpoint.save(checkpoints, row["epoch"], progress.state, saved, row["val_loss"])
            console.print(printing.epoch_line(progress.history))
            hand_back_memory()
            if received := signal_to_any():
                raise stopped(experiment, progress, received)
    return progress


def discard_results(workdir: Path, progress: Progress) -> None:
    """Deletes what was found of a finished run, before it is trained on from `progress`.

    Raises:
        WorkdirError: if nothing but these results is left of it.
    """
    if int(progress.state.step) == 0 and (workdir / "summary.json").exists():
        raise WorkdirError(
            f"the run in {workdir} is finished and its checkpoints are gone: take another "
            "--workdir, or --resume=never to start anew"
        )
    for path in (workdir / "summary.json", *workdir.glob("evaluation-*.json")):
        path.unlink(missing_ok=True)


def restore(
    experiment: Experiment, checkpoints: checkpoint.Checkpoints, console: Console
) -> Progress:
    """What the newest checkpoint holds, or the beginning.

    Raises:
        CheckpointError: if there are checkpoints, and none can be restored.
        CommandError: if the processes do not see the same ones.
    """
    there = {"checkpoints": [sorted(each.all_steps()) for each in checkpoints.values()]}
    coordination.check_equal("checkpoints in its --workdir, which all must share,", there)
    state, totals = experiment.init_state(), step.init_totals(experiment.mesh)
    parse = functools.partial(from_json, Saved)
    found = checkpoint.restore_newest(checkpoints, state, totals, console.print, parse)
    if found is None:
        return Progress(state, [], totals)
    state, totals, record = found
    progress = Progress(state, record["history"], totals, record.get("seconds", 0.0))
    console.print(f"the run is resumed after {place(experiment, progress)}")
    return progress


def train_epoch(
    experiment: Experiment,
    progress: Progress,
    feed: feeds.Feed,
    between_steps: Callable[[int, Progress], None],
    console: Console,
) -> Progress:
    """Takes the steps that are left of the epoch under way, then evaluates.

    Args:
        experiment: of the run.
        progress: so far; its state is consumed.
        feed: the images.
        between_steps: is called with how many steps of the epoch are taken, and with the progress.
        console: takes a bar.
    """
    steps, epoch = experiment.steps_per_epoch, len(progress.history) + 1
    start = time.perf_counter() - progress.seconds
    left = range(int(progress.state.step) % steps + 1, steps + 1)
    for taken in tracked(left, f"epoch {epoch}", console):
        running, batch = progress.totals, next(feed.batches)
        with jax.transfer_guard("disallow"):
            state, totals = feed.step(progress.state, progress.totals, batch)
        # No more than one step waits for another, so that a signal is heeded soon.
        jax.block_until_ready(running)
        progress = Progress(state, progress.history, totals, time.perf_counter() - start)
        if taken < steps:
            between_steps(taken, progress)
    check_finite(progress, epoch)
    seconds = time.perf_counter() - start
    totals, validation = jax.device_get((progress.totals, feed.evaluate(progress.state)))
    row = summarise_epoch(experiment, epoch, totals, validation)
    row |= {"images_per_second": float(totals.count / seconds), "seconds": seconds}
    history = [*progress.history, row]
    return Progress(progress.state, history, step.init_totals(experiment.mesh))


def summarise_epoch(
    experiment: Experiment, epoch: int, totals: step.Totals, validation: step.Totals
) -> records.Row:
    """Losses and accuracies of an epoch, from its totals in NumPy."""
    row = {
        "epoch": epoch,
        "train_loss": float(totals.loss / totals.count),
        "train_accuracy": float(totals.correct / totals.count),
        "val_loss": float(validation.loss / validation.count),
        "val_accuracy": float(validation.correct / validation.count),
        "learning_rate": float(experiment.schedule(epoch * experiment.updates_per_epoch - 1)),
    }
    if validation.correct_top5 is not None:
        row["val_top5_accuracy"] = float(validation.correct_top5 / validation.count)
    if not math.isfinite(row["val_loss"]):
        last_step = epoch * experiment.steps_per_epoch - 1
        raise DivergedError(not_finite("validation loss", last_step, epoch))
    return row


def save_or_stop(
    experiment: Experiment,
    checkpoints: checkpoint.Checkpoints,
    signal_received: Callable[[], int | None],
    taken: int,
    progress: Progress,
) -> None:
    """Saves `progress` within an epoch if it is time to, or a signal has come; then it stops.

    Raises:
        DivergedError: if a loss or a parameter is not finite; nothing is saved then.
        Interrupted: if a signal has come.
    """
    every = experiment.settings.save_every_steps
    received = signal_received()
    if received is None and (every is None or taken % every):
        return
    epoch = len(progress.history) + 1
    check_finite(progress, epoch)
    record = {"history": progress.history, "seconds": progress.seconds}
    checkpoint.save_unfinished(checkpoints, progress.state, progress.totals, record)
    if received is not None:
        raise stopped(experiment, progress, received)


def stopped(experiment: Experiment, progress: Progress, received: int) -> Interrupted:
    """What to raise after a signal; only process 0 has something to say."""
    if not coordination.is_first():
        return Interrupted()
    return Interrupted(
        f"the run was stopped by {signal.Signals(received).name} after "
        f"{place(experiment, progress)}; all is saved, and the same command goes on from there"
    )


def place(experiment: Experiment, progress: Progress) -> str:
    """How far a run has come, for people."""
    steps, epochs = experiment.steps_per_epoch, len(progress.history)
    taken = int(progress.state.step) % steps
    if not taken:
        return f"epoch {epochs} of {experiment.settings.training.epochs}"
    return f"step {taken} of {steps} of epoch {epochs + 1}"


def check_finite(progress: Progress, epoch: int) -> None:
    """Raises `DivergedError` if a loss or a parameter is not finite; waits for the last step.

    XLA makes ReLU's NaN zeros on some devices, so that a loss may be finite of parameters that are
    not.
    """
    bad_step = int(progress.totals.bad_step)
    if bad_step != step.NO_STEP:
        raise DivergedError(not_finite("training loss", bad_step, epoch))
    state = progress.state
    if not_finite_in({"params": state.params, "batch_stats": state.batch_stats}):
        raise DivergedError(not_finite("network", int(state.step) - 1, epoch))


def not_finite(what: str, step: int, epoch: int) -> str:
    """The message for a loss that is not finite at `step`, counted from 0."""
    kept = f"the checkpoint of epoch {epoch - 1} is kept" if epoch > 1 else "nothing was saved yet"
    return (
        f"the {what} is not finite at step {step} (epoch {epoch}); {kept}; "
        "a lower --learning-rate may help"
    )
