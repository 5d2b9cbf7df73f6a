"""What accuracy costs, in parameters, multiply-adds and seconds, over five folds."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from experiments.studies.drawing import draw_costs
from experiments.studies.study import Study
from experiments.studies.sweep import Outcome, best_recipe, entries
from experiments.training.settings import DataSettings, Settings

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
    base = best_recipe(data, epochs)
    return entries([*WIDER, *HIGHER, *DENSE], base)


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Accuracy against each cost."""
    names = {
        "channel selection, wider": WIDER,
        "channel selection, rank 4": HIGHER,
        "dense": DENSE,
    }
    groups = {label: [o for o in outcomes if o.label in of] for label, of in names.items()}
    return draw_costs(groups, COSTS)


STUDY = Study(
    question="What does accuracy cost in parameters, multiply-adds and seconds?",
    epochs=60,
    entries=settings_of,
    draw=draw,
    scored=("validation",),
    folds=True,
    reference=WIDER[0],
)
