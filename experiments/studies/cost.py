"""What accuracy costs, in parameters, multiply-adds and seconds, over five folds."""

import dataclasses
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from experiments.studies.study import Study
from experiments.studies.sweep import ACCURACY, Outcome, draw_seeds, entries
from experiments.training.settings import RECIPES, DataSettings, Settings

WIDER = tuple(f"chansel-w{width}" for width in (16, 24, 32, 44))
HIGHER = ("chansel-r4",)
DENSE = tuple(f"subkernel-w{width}" for width in (6, 8, 12, 16))
COSTS = {
    "parameters": "parameters",
    "multiply_adds": "multiply-adds an image",
    "seconds_per_epoch": "seconds an epoch",
}


def settings_of(data: DataSettings, epochs: int) -> Mapping[str, Settings]:
    """Every network, with one recipe."""
    base = Settings(data=data, training=dataclasses.replace(RECIPES["best"], epochs=epochs))
    return entries([*WIDER, *HIGHER, *DENSE], base)


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Accuracy against each cost."""
    picture = Figure(figsize=(13, 4.2), layout="constrained")
    groups = {
        "channel selection, wider": WIDER,
        "channel selection, rank 4": HIGHER,
        "dense": DENSE,
    }
    for axes, (cost, heading) in zip(
        picture.subplots(1, len(COSTS), sharey=True), COSTS.items(), strict=True
    ):
        for colour, (label, names) in enumerate(groups.items()):
            group = [outcome for outcome in outcomes if outcome.label in names]
            places = [outcome.mean(cost) for outcome in group]
            draw_seeds(axes, places, group, "final_val_accuracy", label, f"C{colour}")
        axes.set(xscale="log", xlabel=heading)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    picture.axes[0].set_ylabel(ACCURACY)
    picture.axes[0].legend(fontsize=8)
    return picture


STUDY = Study(
    question="What does accuracy cost in parameters, multiply-adds and seconds?",
    epochs=60,
    entries=settings_of,
    draw=draw,
    scored=("validation",),
    folds=True,
    reference=WIDER[0],
)
