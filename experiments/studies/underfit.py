"""Whether channel selection, its few parameters, or the optimiser keeps it from fitting."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments.reporting import plots
from experiments.studies.drawing import DENSE, HIGHER, SELECTION, SMALL, WIDER
from experiments.studies.overfit import UNREGULARISED
from experiments.studies.study import Study
from experiments.studies.sweep import (
    Outcome,
    at_rates,
    best_rates,
    best_recipe,
    changed,
    entries,
    network_of,
)
from experiments.training.settings import DataSettings, Settings

# `subkernel-w6` has 24,987 parameters, `chansel` 27,363: as many as a dense network comes near it.
NETWORKS = ("chansel", "subkernel", "subkernel-w6", "chansel-w32", "chansel-r4")
COLOURS = dict(zip(NETWORKS, (SELECTION, DENSE, SMALL, WIDER, HIGHER), strict=True))
RATES = (0.005, 0.02, 0.08)
PLAIN = UNREGULARISED | {"cutout": 0, "label_smoothing": 0.0}
RANDOM = ", random labels"
TUNED_BY = "plain_train_loss"


def settings_of(data: DataSettings, epochs: int) -> Mapping[str, Settings]:
    """Every network at every rate, with nothing that keeps it from fitting its images."""
    base = best_recipe(data, epochs)
    plain = changed(base, PLAIN)
    by_heart = entries(NETWORKS[:3], changed(plain, {"random_labels": True}))
    by_heart = {f"{name}{RANDOM}": settings for name, settings in by_heart.items()}
    return at_rates(entries(NETWORKS, plain) | by_heart, RATES)


def note(epochs: int) -> str:
    """What was left out, and how the rate was chosen."""
    return (
        "Nothing is augmented, dropped, smoothed or decayed. Each network was trained at every "
        "rate from the first seed, and from the others at the rate of the lowest train loss."
    )


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Train loss against epoch of each network at its best rate; the seeds make a band."""
    picture = Figure(figsize=(8, 4.6), layout="constrained")
    axes = picture.add_subplot()
    for outcome in best_rates(outcomes, TUNED_BY):
        losses = np.array([[row["train_loss"] for row in run.metrics] for run in outcome.runs])
        epochs = range(1, losses.shape[1] + 1)
        network = network_of(outcome.label)
        colour = COLOURS[network.removesuffix(RANDOM)]
        line = "--" if network.endswith(RANDOM) else "-"
        plots.draw_runs(axes, epochs, losses, outcome.label, color=colour, linestyle=line)
    axes.set(yscale="log", xlabel="epoch", ylabel="train loss, mean over the epoch's steps")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return picture


STUDY = Study(
    question="Is it the layer, the number of parameters or the optimiser that underfits?",
    epochs=200,
    entries=settings_of,
    draw=draw,
    note=note,
    scored=("train", "validation"),
    tuned_by=TUNED_BY,
    reference=NETWORKS[0],
    references={f"{name}{RANDOM}": f"{NETWORKS[0]}{RANDOM}" for name in NETWORKS[:3]},
)
