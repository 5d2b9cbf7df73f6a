"""Pictures that several commands draw."""

import contextlib
import itertools
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from chansel_jax.files import replaced

DPI = 120
NO_LEVELS: Mapping[str, float] = MappingProxyType({})

USUAL = "sans-serif"  # the family of the fonts in pictures
FEW_EPOCHS = 5  # which lines alone would hardly show
FEW_CLASSES = 20  # of which a picture and a terminal have room for every count
LONGEST_NAME = 24  # in letters, beside a picture
MOST_NAMES = 100  # that can be read beside a picture


def save(picture: Figure, path: Path) -> None:
    """Writes a PNG; a reader sees the old file or the new one, never half."""
    with replaced(path) as partial:
        picture.savefig(partial, dpi=DPI, format="png")


def curves(
    histories: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    published: Mapping[str, float] = NO_LEVELS,
) -> Figure:
    """Losses on the left, accuracies on the right, all networks on one axis: a colour a network.

    Args:
        histories: by network, those of its runs, of equal length; the lines are their means, the
            bands reach from the least to the greatest.
        published: accuracies that are shown as lines across, by what they are of.
    """
    picture = Figure(figsize=(11, 4.6), layout="constrained")
    grid = picture.subplots(1, 2)
    for axes, kind, heading in zip(
        grid, ("loss", "accuracy"), ("cross-entropy", "accuracy"), strict=True
    ):
        for colour, (network, runs) in enumerate(histories.items()):
            epochs = [row["epoch"] for row in runs[0]]
            marker = "o" if len(epochs) < FEW_EPOCHS else None
            for split, name, line in (("train", "train", "--"), ("val", "validation", "-")):
                values = np.array([[row[f"{split}_{kind}"] for row in run] for run in runs])
                style = {"color": f"C{colour}", "marker": marker, "linestyle": line}
                draw_runs(axes, epochs, values, f"{network}, {name}", **style)
        axes.set(xlabel="epoch", ylabel=heading)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    for (name, level), line in zip(published.items(), itertools.cycle((":", "-.", "--"))):
        style = {"color": "black", "linewidth": 0.8, "linestyle": line}
        grid[1].axhline(level, label=f"{name}, published", **style)
    handles, labels = grid[1].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside right upper", fontsize=8)
    return picture


def losses(history: Sequence[Mapping[str, Any]], best: Mapping[str, Any], title: str) -> Figure:
    """Train (blue) and validation (orange) losses over the epochs of a run, the best one marked."""
    picture = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = picture.add_subplot()
    epochs = [row["epoch"] for row in history]
    for name, label, colour in (
        ("train_loss", "train", "tab:blue"),
        ("val_loss", "validation", "tab:orange"),
    ):
        axes.plot(epochs, [row[name] for row in history], ".-", label=label, color=colour)
    axes.plot(
        *(best["epoch"], best["val_loss"], "o"),
        mfc="none",
        color="tab:orange",
        label=f"{best['val_loss']:.4f} after epoch {best['epoch']}",
    )
    axes.set(title=title, xlabel="epoch", ylabel="cross-entropy")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    return picture


def draw_runs(
    axes: Axes, epochs: Sequence[int], values: np.ndarray, label: str, color: str, **style: Any
) -> None:
    """The mean of `values` `(runs, epochs)` as a line, in a band from the least to the greatest."""
    axes.plot(epochs, values.mean(axis=0), label=label, color=color, linewidth=1.2, **style)
    axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2)


def confusion_matrices(matrices: Mapping[str, np.ndarray], class_names: Sequence[str]) -> Figure:
    """One of counts `(C, C)` for each network, side by side; of many classes colours alone."""
    labels, families = drawable(class_names)
    few = len(class_names) <= FEW_CLASSES
    style = {"fontfamily": families, "parse_math": False, "fontsize": 10 if few else 6}
    turned = {"rotation": 45, "ha": "right"} if few else {"rotation": 90}
    size = 1.8 + 0.55 * min(len(class_names), FEW_CLASSES)
    figure = Figure(figsize=((size + 0.2) * len(matrices), size), layout="constrained")
    grid = figure.subplots(1, len(matrices), squeeze=False)[0]
    for axes, (name, confusion) in zip(grid, matrices.items(), strict=True):
        # Coloured by the share of the row.
        shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (i, j), count in np.ndenumerate(confusion if few else []):
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, f"{count:,}", ha="center", va="center", color=colour, fontsize=8)
        step = -(-len(class_names) // MOST_NAMES)
        places, shown = range(0, len(class_names), step), labels[::step]
        axes.set_xticks(places, shown, **turned, **style)
        axes.set_yticks(places, shown, **style)
        axes.set(title=name, xlabel="taken for", ylabel="class")
    return figure


def drawable(class_names: Sequence[str]) -> tuple[list[str], list[str]]:
    """What classes are called in a picture, and the families of fonts that it takes.

    A name with a character that no font of this machine has becomes the number of its class.
    """
    families = _families(set("".join(class_names)))
    labels = [
        shorten(name) if families.keys() >= set(name) else f"class {number}"
        for number, name in enumerate(class_names)
    ]
    return labels, [USUAL, *sorted({*families.values()} - {USUAL})]


def shorten(name: str) -> str:
    """`name`, of which a picture has room for the beginning."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def _families(characters: Set[str]) -> dict[str, str]:
    """For each of the characters a family of fonts that has it, where there is one."""
    usual = font_manager.findfont(font_manager.FontProperties(family=[USUAL]))
    # The fonts of last resort draw a box for every character.
    others = [f for f in font_manager.fontManager.ttflist if "lastresort" not in f.fname.lower()]
    found = {}
    for path, family in ((usual, USUAL), *((font.fname, font.name) for font in others)):
        if missing := characters - found.keys():
            with contextlib.suppress(OSError, RuntimeError):  # it is gone, or of bitmaps
                font = font_manager.get_font(path)
                found |= {c: family for c in missing if font.get_char_index(ord(c))}
    return found
