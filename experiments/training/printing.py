"""What a training run prints."""

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax
import jax
from rich.console import Console

from chansel_jax.counting import LayerCount
from chansel_jax.data import Dataset
from experiments.reporting.tables import print_table
from experiments.training.records import Row, best_epoch

EPOCH_HEADER = (
    "epoch  train loss     acc  val loss     acc  learning rate  images/s  train s  best epoch"
)


def epoch_header(top5: bool) -> str:
    """The names of the columns of `epoch_line`, with one for the accuracy among the first five."""
    return EPOCH_HEADER.replace("  learning", "    top 5  learning") if top5 else EPOCH_HEADER


def print_header(dataset: Dataset, devices: Sequence[jax.Device], console: Console) -> None:
    """Prints devices, versions and the data's sizes."""
    sizes = ", ".join(f"{len(split.labels):,} {name}" for name, split in dataset.splits.items())
    height, width, channels = dataset.splits["train"].images.shape[1:]
    console.print(f"{len(devices)} × {devices[0].device_kind} ({devices[0].platform})")
    console.print(
        f"Python {platform.python_version()}, jax {jax.__version__}, flax {flax.__version__}"
    )
    console.print(
        f"{dataset.name}: {sizes} images of {height} × {width} × {channels}, "
        f"{len(dataset.class_names)} classes"
    )


def print_layers(rows: Sequence[LayerCount], title: str, console: Console) -> None:
    """Prints a network's layers with their parameters and multiply-adds."""
    cells = [
        (
            row.name,
            row.kind,
            " × ".join(map(str, row.output)),
            f"{row.parameters:,}",
            f"{row.multiply_adds:,}",
        )
        for row in rows
    ]
    parameters = sum(row.parameters for row in rows)
    multiply_adds = sum(row.multiply_adds for row in rows)
    cells.append(("total", "", "", f"{parameters:,}", f"{multiply_adds:,}"))
    print_table(("layer", "kind", "output", "parameters", "multiply-adds"), cells, console, title)


def epoch_line(history: Sequence[Row]) -> str:
    """The last epoch of `history` in the columns of `epoch_header`."""
    row, best = history[-1], best_epoch(history)
    top5 = f"  {row['val_top5_accuracy']:7.2%}" if "val_top5_accuracy" in row else ""
    return (
        f"{row['epoch']:5d}  {row['train_loss']:10.4f} {row['train_accuracy']:7.2%}"
        f"  {row['val_loss']:8.4f} {row['val_accuracy']:7.2%}{top5}  {row['learning_rate']:13.2e}"
        f"  {row['images_per_second']:8,.0f}  {row['seconds']:7.1f}"
        f"  {best['epoch']:4d} ({best['val_loss']:.4f})"
    )


def print_summary(summary: Mapping[str, Any], workdir: Path, console: Console) -> None:
    """Prints the row of the original's table."""
    title = f"{summary['dataset']}, {summary['model']}, {summary['conv']}"
    cells = {
        "parameters": f"{summary['parameters']:,}",
        "best validation loss": (
            f"{summary['best_val_loss']:.4f} (train {summary['train_loss_at_best']:.4f}, "
            f"epoch {summary['best_epoch']})"
        ),
        "best accuracy": (
            f"{summary['best_val_accuracy']:.2%} (epoch {summary['best_accuracy_epoch']})"
        ),
        **(
            {"best top-5 accuracy": f"{summary['best_val_top5_accuracy']:.2%}"}
            if "best_val_top5_accuracy" in summary
            else {}
        ),
        "train s an epoch": f"{summary['seconds_per_epoch']:.2f}",
    }
    print_table(tuple(cells), [tuple(cells.values())], console, title)
    console.print(f"the run is written to {workdir}")
