"""How much longer trainings, averaged parameters and a teacher bring."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from experiments.studies.drawing import ACCURACY, OTHERS, SELECTION, draw_seeds
from experiments.studies.study import Study
from experiments.studies.sweep import Origin, Outcome, best_recipe, changed
from experiments.training.settings import DataSettings, Settings

LENGTHS = (1, 2, 4)  # times the epochs
MIXED = {"mixup": 0.2}
TEACHER = "teacher: subkernel, width 32"
KINDS = {
    "plain": (LENGTHS, {}),
    "averaged": (LENGTHS, {"ema": 0.998}),  # over some five epochs of 93 steps
    "mixup": (LENGTHS[-1:], MIXED),
    "mixup and teacher": (LENGTHS[-1:], MIXED),
}


def settings_of(data: DataSettings, epochs: int) -> Mapping[str, Settings]:
    """Channel selection of every length and kind; before them the network that teaches."""
    base = best_recipe(data, epochs)
    found = {TEACHER: changed(base, {"conv": "subkernel", "width": 32})}
    for kind, (lengths, changes) in KINDS.items():
        for times in lengths:
            found[labelled(kind, times)] = changed(base, changes | {"epochs": times * epochs})
    return found


def labelled(kind: str, times: int) -> str:
    """What a row is called."""
    return f"{kind}, {times} × as long"


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Accuracy against epochs, a line a kind."""
    picture = Figure(figsize=(7, 4.4), layout="constrained")
    axes = picture.add_subplot()
    for colour, kind in zip((SELECTION, *OTHERS), KINDS, strict=True):
        rows = [o for o in outcomes if o.label.rpartition(", ")[0] == kind]
        epochs = [row.mean("epochs") for row in rows]
        draw_seeds(axes, epochs, rows, "final_val_accuracy", kind, colour)
    for outcome in outcomes:
        if outcome.label == TEACHER:
            level = outcome.mean("final_val_accuracy")
            axes.axhline(level, color="grey", linestyle=":", label=TEACHER)
    axes.set(xscale="log", xlabel="epochs", ylabel=ACCURACY)
    ticks = sorted({row.mean("epochs") for row in outcomes})
    axes.set_xticks(ticks, [f"{epochs:g}" for epochs in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    return picture


STUDY = Study(
    question="How far do longer trainings, averaged parameters and a teacher bring it?",
    epochs=60,
    entries=settings_of,
    draw=draw,
    scored=("validation",),
    origins={labelled("mixup and teacher", LENGTHS[-1]): Origin(TEACHER, "teacher")},
    reference=labelled("plain", LENGTHS[0]),
    references={
        labelled("mixup and teacher", LENGTHS[-1]): labelled("mixup", LENGTHS[-1]),
        labelled("mixup", LENGTHS[-1]): labelled("plain", LENGTHS[-1]),
        **{labelled("averaged", times): labelled("plain", times) for times in LENGTHS},
    },
)
