"""What accuracy costs, in parameters, multiply-adds and seconds, over five folds."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from experiments.studies import drawing
from experiments.studies.study import Study
from experiments.studies.sweep import (
    Outcome,
    at_rates,
    best_rates,
    best_recipe,
    entries,
    network_of,
)
from experiments.training.settings import DataSettings, Settings

WIDER = tuple(f"chansel-w{width}" for width in (16, 24, 32, 44))
HIGHER = ("chansel-r4",)
DENSE = tuple(f"subkernel-w{width}" for width in (6, 8, 12, 16))
RATES = (0.02, 0.06)
# Channel selection, and the dense network of nearly as many parameters.
AS_LARGE = {
    "chansel-w16": "subkernel-w6",
    "chansel-w24": "subkernel-w8",
    "chansel-w32": "subkernel-w12",
    "chansel-w44": "subkernel-w16",
    "chansel-r4": "subkernel-w12",
}
TUNED_BY = "final_val_accuracy"
COSTS = {
    "parameters": "parameters",
    "multiply_adds": "multiply-adds an image",
    "seconds_per_epoch": "seconds an epoch",
}


def settings_of(data: DataSettings, epochs: int) -> Mapping[str, Settings]:
    """Every network at each rate, with one recipe."""
    base = best_recipe(data, epochs)
    return at_rates(entries([*WIDER, *HIGHER, *DENSE], base), RATES)


def note(epochs: int) -> str:
    """How the rates were chosen, and what the seconds are."""
    return (
        "The first fold chose the learning rate of each network, and the others are what its row "
        "reports. The seconds are those of these trainings, which may have shared their machine: "
        "`python -m experiments.benchmark --what=step --convs=...` times networks in turn."
    )


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Accuracy against each cost."""
    names = {
        "dense": (drawing.DENSE, DENSE),
        "channel selection, wider": (drawing.SELECTION, WIDER),
        "channel selection, rank 4": (drawing.HIGHER, HIGHER),
    }
    best = best_rates(outcomes, TUNED_BY)
    groups = {
        name: (colour, [o for o in best if network_of(o.label) in of])
        for name, (colour, of) in names.items()
    }
    return drawing.draw_costs(groups, COSTS)


STUDY = Study(
    question="What does accuracy cost in parameters, multiply-adds and seconds?",
    epochs=60,
    entries=settings_of,
    draw=draw,
    note=note,
    scored=("validation",),
    tuned_by=TUNED_BY,
    folds=True,
    references=AS_LARGE,
)
