"""Which optimiser, each at its best learning rate."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from experiments.studies.drawing import ACCURACY, OTHERS, draw_seeds
from experiments.studies.study import Study
from experiments.studies.sweep import AT_RATE, Outcome, at_rates, best_recipe, changed, entries
from experiments.training.settings import DataSettings, Settings

NETWORKS = ("chansel", "subkernel")
# The second of each is its usual one, about which the others lie by factors of three.
RATES = {
    "sgd": (0.03, 0.1, 0.3, 1.0),
    "adamw": (0.003, 0.01, 0.03, 0.1),
    "muon": (0.007, 0.02, 0.06, 0.2),
}
# SGD's is a part of the gradient, the others' of the learning rate.
DECAY = {"sgd": 5e-4, "adamw": 0.05, "muon": 0.05}


def settings_of(data: DataSettings, epochs: int) -> Mapping[str, Settings]:
    """Both networks with every optimiser at each of its rates; all else is the recipe `best`."""
    base = best_recipe(data, epochs)
    found = {}
    for optimizer, rates in RATES.items():
        changes = {"optimizer": optimizer, "weight_decay": DECAY[optimizer]}
        rows = entries(NETWORKS, changed(base, changes))
        rows = {f"{name}, {optimizer}": settings for name, settings in rows.items()}
        found |= at_rates(rows, rates)
    return found


def note(epochs: int) -> str:
    """How the rate of further seeds was chosen."""
    return (
        "Every optimiser was tried at each rate from the first seed. Further seeds were trained at "
        "the best rate, and are alone in its row, for their validation images have chosen nothing."
    )


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Accuracy against learning rate, a line an optimiser, both networks side by side."""
    picture = Figure(figsize=(10, 4.2), layout="constrained")
    for axes, network in zip(picture.subplots(1, 2, sharey=True), NETWORKS, strict=True):
        for colour, optimizer in zip(OTHERS, RATES, strict=True):
            label = f"{network}, {optimizer}"
            rows = [o for o in outcomes if o.label.startswith(label + AT_RATE)]
            places = [float(o.label.rpartition(AT_RATE)[2]) for o in rows]
            tried = [Outcome(o.label, (o.tried or o.runs)[:1]) for o in rows]
            draw_seeds(axes, places, tried, "final_val_accuracy", optimizer, colour)
            for place, further in ((p, o) for p, o in zip(places, rows, strict=True) if o.tried):
                values = further.values("final_val_accuracy")
                style = {"color": colour, "mfc": "none", "linestyle": "none"}
                label = f"{optimizer}, further seeds"
                axes.plot([place] * len(values), values, "D", label=label, **style)
        axes.set(xscale="log", xlabel="highest learning rate", title=network)
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    picture.axes[0].set_ylabel(ACCURACY)
    return picture


STUDY = Study(
    question="Which optimiser is best for either convolution, each at its best learning rate?",
    epochs=60,
    entries=settings_of,
    draw=draw,
    note=note,
    scored=("validation",),
    tuned_by="final_val_accuracy",
    folds=True,
    reference="chansel, muon",
    references={f"subkernel, {optimizer}": "subkernel, muon" for optimizer in ("sgd", "adamw")},
)
