"""The same parameters, trained better: by where they begin, and by what decays."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from experiments.studies.drawing import ACCURACY, draw_rows
from experiments.studies.study import Study
from experiments.studies.sweep import Origin, Outcome, best_recipe, changed
from experiments.training.settings import DataSettings, Settings

PLAIN, DENSE, FROM_DENSE = "plain", "the dense network", "begins with the dense network's factors"
MERGED, BRANCHED = "two matrices in training", "four branches in training"
SPECTRAL, COMPOSED = {"initialiser": "spectral"}, {"decay_composed": True}
FACTORS = {
    PLAIN: {},
    "spectral beginning": SPECTRAL,
    "the composed kernel decays": COMPOSED,
    "both": SPECTRAL | COMPOSED,
    MERGED: {"conv": "subspace", "share": 1.0},
    BRANCHED: {"branches": 4},
    DENSE: {"conv": "subkernel"},
    FROM_DENSE: {},
    f"{FROM_DENSE}, the composed kernel decays": COMPOSED,
}
"""What is changed in the recipe `best` of channel selection."""


def settings_of(data: DataSettings, epochs: int) -> Mapping[str, Settings]:
    """Channel selection with each change, and the dense network."""
    base = best_recipe(data, epochs)
    return {label: changed(base, changes) for label, changes in FACTORS.items()}


def note(epochs: int) -> str:
    """What is in the rows that begin with others."""
    return (
        f'In the row "{MERGED}" the pointwise part is the product of two, which '
        "`chansel_jax.factorize.merge_subspaces` can put in their place: the network then computes "
        "the same with the parameters of the plain one. A loss of its own holds the first of the "
        f'two near a rotation, as in BSConv-S. In the row "{BRANCHED}" every kernel is the mean '
        "of four, which have a scale for every output channel, as `chansel_jax.training.branches` "
        "makes them; the network has the mean at every step. The rows that begin with the dense "
        "network's factors have been trained twice as long in all: that network first, then what "
        "its kernels' leading singular vectors make."
    )


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """The accuracy of every row."""
    return draw_rows(outcomes, "final_val_accuracy", ACCURACY)


STUDY = Study(
    question="Can the same parameters of channel selection be trained better?",
    epochs=60,
    entries=settings_of,
    draw=draw,
    note=note,
    scored=("validation",),
    origins={label: Origin(DENSE, "factors") for label in FACTORS if label.startswith(FROM_DENSE)},
    reference=PLAIN,
)
