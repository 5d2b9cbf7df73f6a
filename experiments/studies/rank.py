"""How many channel selections a convolution needs."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from experiments.studies.drawing import ACCURACY, DENSE, SELECTION, draw_seeds
from experiments.studies.study import Study
from experiments.studies.sweep import Outcome, best_recipe, entries
from experiments.training.settings import DataSettings, Settings

RANKS = (1, 2, 3, 4, 6, 9)
PREFIX = "chansel-r"


def settings_of(data: DataSettings, epochs: int) -> Mapping[str, Settings]:
    """Every rank, and the dense network."""
    base = best_recipe(data, epochs)
    return entries(["subkernel", *(f"{PREFIX}{rank}" for rank in RANKS)], base)


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Accuracy and train loss against the rank; the dense network is a line across."""
    factored = {
        int(outcome.label.removeprefix(PREFIX)): outcome
        for outcome in outcomes
        if outcome.label.startswith(PREFIX)
    }
    picture = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, name, heading in zip(
        picture.subplots(1, 2),
        ("final_val_accuracy", "final_train_loss"),
        (ACCURACY, "train loss, last epoch"),
        strict=True,
    ):
        for dense in outcomes:
            if dense.label == "subkernel":
                axes.axhline(dense.mean(name), color=DENSE, label="dense")
        places, rows = list(factored), list(factored.values())
        draw_seeds(axes, places, rows, name, "channel selection", SELECTION)
        axes.set(xlabel="rank", ylabel=heading, xticks=RANKS)
        axes.grid(alpha=0.3)
    axes.legend()
    return picture


STUDY = Study(
    question="How much does each further rank add, and how many make up for the dense convolution?",
    epochs=100,
    entries=settings_of,
    draw=draw,
    scored=("validation",),
    reference="subkernel",
)
