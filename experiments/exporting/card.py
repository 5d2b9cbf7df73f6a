"""The model card beside exported files: a README.md as Hugging Face's hub has them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.exporting.formats import FORMATS, Name, code
from experiments.reporting.tables import escape
from experiments.studies.runs import Record
from experiments.training.load import Run

# Of every card.
BEGINNING = """---
library_name: "chansel_jax"
"""

# What the card calls the convolutions.
CONVOLUTIONS = {
    "chansel": "channel selection (BSConv-U)",
    "subspace": "channel selection from a subspace (BSConv-S)",
    "subkernel": "the ordinary, dense convolution",
}


def model_card(run: Run, record: Record, written: Sequence[Name]) -> str:
    """What the network is, what it was trained on, how good it is, and how each file is loaded.

    Args:
        run: the trained network.
        record: what is kept of that run.
        written: the formats of the files beside the card.

    Raises:
        ValueError: if the record has no epoch of the run's checkpoint.
    """
    found = figures(run, record)
    settings, (height, width, _) = run.settings, run.image_shape
    name = f"{settings.network.model}-{settings.conv}"
    head = {
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "jax", "flax", *written],
        "metrics": ["accuracy"],
        "model-index": [{"name": name, "results": _results(settings.data.dataset, found)}],
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    classes = "\n".join(
        f"{i}. {escape(json.dumps(each))}" for i, each in enumerate(run.class_names)
    )
    rows = "\n".join(f"| {label} | {value} |" for label, value in _table(run, record, found))
    files = "\n\n".join(
        f"## {FORMATS[each].file}\n\n{FORMATS[each].described}\n\n```python\n{code(each, run)}\n```"
        for each in written
    )
    return f"""{BEGINNING}{front}
---

# {name}

This network tells the class of an image. It is the residual network `{settings.network.model}` of
chansel_jax, whose convolution is {_conv(run)}.
It was trained with `python -m experiments.train` on the data set `{settings.data.dataset}`, from
the seed {settings.seed}.

| | |
| --- | ---: |
{rows}

The images that it takes are arrays `images` `(N, {height}, {width}, 3)` of uint8, red, green and
blue from 0 to 255. What it gives are the probabilities `(N, {len(run.class_names)})` of these
classes, in float32:

{classes}

{files}
"""


def figures(run: Run, record: Record) -> dict[str, Mapping[str, Any]]:
    """The loss and accuracy of the run's checkpoint, by split, as far as they were measured.

    Those of test images count only if they are the run's own.
    """
    rows = [row for row in record.metrics if row["epoch"] == run.epoch]
    if not rows:
        raise ValueError(f"metrics.jsonl of {run.workdir} has no epoch {run.epoch}")
    found = {"validation": {"loss": rows[0]["val_loss"], "accuracy": rows[0]["val_accuracy"]}}
    test = record.evaluations.get("test")
    digest = record.data["digests"].get("test")
    if test and (test["epoch"], test["images_sha256"]) == (run.epoch, digest):
        found["test"] = test
    return found


def _results(dataset: str, found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a card's `model-index` says of the figures."""
    return [
        {
            "task": {"type": "image-classification"},
            "dataset": {"name": dataset, "type": dataset, "split": split},
            "metrics": [{"type": kind, "value": of_split[kind]} for kind in ("accuracy", "loss")],
        }
        for split, of_split in found.items()
    ]


def _table(
    run: Run, record: Record, found: Mapping[str, Mapping[str, Any]]
) -> list[tuple[str, str]]:
    summary = record.summary
    rows = [
        ("parameters", f"{summary['parameters']:,}"),
        ("multiply-adds an image", f"{summary['multiply_adds']:,}"),
        ("training images", f"{summary['images']['train']:,}"),
        ("epoch", f"{run.epoch} of {summary['epochs']}"),
    ]
    if (dtype := run.settings.network.dtype) != "float32":
        rows.append(("computes in", f"float32; for the figures below, in {dtype}"))
    for split, of_split in found.items():
        rows.append((f"{split} loss", f"{of_split['loss']:.4f}"))
        rows.append((f"{split} accuracy", f"{of_split['accuracy']:.2%}"))
    return rows


def _conv(run: Run) -> str:
    network, told = run.settings.network, CONVOLUTIONS[run.settings.conv]
    if network.ranks:
        return f"{told} of the ranks {', '.join(map(str, network.ranks))}"
    return told if network.rank == 1 else f"{told} of rank {network.rank}"
