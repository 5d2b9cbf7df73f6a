"""What a run leaves in its folder for people and programs to read, checkpoints apart.

`config.json`, `metrics.jsonl`, TensorBoard events, `losses.png` and `summary.json`. The history of
a run is a list of rows, one an epoch.
"""

import contextlib
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict


class Row(TypedDict):
    """What is known of an epoch of a run: a line of its `metrics.jsonl`."""

    epoch: int
    train_loss: float
    train_accuracy: float
    val_loss: float
    val_accuracy: float
    learning_rate: float
    images_per_second: float
    seconds: float
    val_top5_accuracy: NotRequired[float]  # where the classes are many


class Counts(TypedDict):
    """Of the images of a run."""

    train: int
    validation: int


class Summary(TypedDict):
    """What reports take of a run's `summary.json`; older runs do not know their device."""

    epochs: int
    best_epoch: int
    best_val_loss: float
    train_loss_at_best: float
    val_accuracy_at_best: float
    best_val_accuracy: float
    best_accuracy_epoch: int
    final_train_loss: float
    final_val_loss: float
    final_val_accuracy: float
    seconds_per_epoch: float
    parameters: int
    multiply_adds: int
    images: Counts
    device: NotRequired[str]
    best_val_top5_accuracy: NotRequired[float]


@contextlib.contextmanager
def recorded(workdir: Path, history: Sequence[Row], title: str) -> Iterator[Callable[[Row], None]]:
    """Within it, rows are appended to `metrics.jsonl` and to TensorBoard's events.

    In the end the losses are drawn.

    Args:
        workdir: the run's folder.
        history: the rows so far; `metrics.jsonl` is written anew with them.
        title: of the picture.

    Yields:
        A function that appends a row; its `epoch` is TensorBoard's step.
    """
    rows = []
    with (
        (workdir / "metrics.jsonl").open("w") as lines,
        summary_writer()(str(workdir.absolute()), purge_step=len(history) + 1) as events,
        contextlib.ExitStack() as ending,
    ):
        lines.write(metrics_text(history))
        lines.flush()

        def write(row: Row) -> None:
            rows.append(row)
            lines.write(metrics_text([row]))
            lines.flush()
            for name, value in row.items():
                if name != "epoch":
                    events.add_scalar(name, value, row["epoch"])
            events.flush()

        def draw(error: type | None, *_: object) -> None:
            try:
                from experiments.reporting import plots  # imports Matplotlib, most of a second

                if every := [*history, *rows]:
                    picture = plots.losses(every, best_epoch(every), title)
                    plots.save(picture, workdir / "losses.png")
            except OSError:
                if error is None:  # else it says more
                    raise

        ending.push(draw)
        yield write


def metrics_text(history: Sequence[Row]) -> str:
    """What `metrics.jsonl` holds."""
    return "".join(json.dumps(row) + "\n" for row in history)


def mend(workdir: Path, history: Sequence[Row], title: str) -> None:
    """Makes again what `recorded` has left of a finished run, if some of it is lost or cut."""
    metrics, text = workdir / "metrics.jsonl", metrics_text(history)
    patterns = ("losses.png", "events.out.tfevents.*")
    there = all(any(path.stat().st_size for path in workdir.glob(each)) for each in patterns)
    if there and metrics.is_file() and metrics.read_bytes() == text.encode():
        return
    with recorded(workdir, [], title) as write:
        for row in history:
            write(row)


def summary_writer() -> type:
    """TensorBoard's writer, without PyTorch, which it would import for tensors, for seconds."""
    hidden = sys.modules.setdefault("torch", None) is None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter


def best_epoch(history: Sequence[Row]) -> Row:
    """The row of lowest validation loss, the first of equals."""
    return min(history, key=lambda row: row["val_loss"])


def summarise(history: Sequence[Row]) -> dict[str, float]:
    """The figures of the original's table: losses at the best epoch, accuracies, time.

    Args:
        history: rows with `epoch`, `train_loss`, `val_loss`, `val_accuracy` and `seconds`.

    Returns:
        `epochs`, `best_epoch` (of lowest validation loss), `best_val_loss`, `train_loss_at_best`,
        `val_accuracy_at_best`, `best_val_accuracy` with `best_accuracy_epoch`, `final_train_loss`,
        `final_val_loss`, `final_val_accuracy`, and `seconds_per_epoch`, the median of the epochs'
        training times; `best_val_top5_accuracy` where some rows have a `val_top5_accuracy`.
    """
    best = best_epoch(history)
    most_accurate = max(history, key=lambda row: row["val_accuracy"])
    top5 = [row["val_top5_accuracy"] for row in history if "val_top5_accuracy" in row]
    return {
        "epochs": len(history),
        "best_epoch": best["epoch"],
        "best_val_loss": best["val_loss"],
        "train_loss_at_best": best["train_loss"],
        "val_accuracy_at_best": best["val_accuracy"],
        "best_val_accuracy": most_accurate["val_accuracy"],
        "best_accuracy_epoch": most_accurate["epoch"],
        "final_train_loss": history[-1]["train_loss"],
        "final_val_loss": history[-1]["val_loss"],
        "final_val_accuracy": history[-1]["val_accuracy"],
        "seconds_per_epoch": statistics.median(row["seconds"] for row in history),
        **({"best_val_top5_accuracy": max(top5)} if top5 else {}),
    }
