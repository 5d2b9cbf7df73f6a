"""What keeps channel selection from fitting its training images."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from experiments.studies.study import Study
from experiments.studies.sweep import Outcome, changed
from experiments.training.settings import RECIPES, DataSettings, Settings

FEW = 512
# As many passes more, since an epoch of few images has few steps.
FEW_EPOCHS_FACTOR = 5

NO_AUGMENTATION = {"crop_padding": 0, "flip": False}  # the original's recipe has no more
NO_WEIGHT_DECAY = {"weight_decay": 0.0}
NO_DROPOUT = {"dropout_rate": 0.0}
UNREGULARISED = NO_AUGMENTATION | NO_WEIGHT_DECAY | NO_DROPOUT  # "no regularisers"

FACTORS: Mapping[str, Mapping[str, Any]] = {
    "as the original": {},
    "no dropout": NO_DROPOUT,
    "no weight decay": NO_WEIGHT_DECAY,
    "no weight decay on depthwise kernels": {"undecayed": ("biases", "norms", "depthwise")},
    "no augmentation": NO_AUGMENTATION,
    "learning rate / 5": {"learning_rate": 1e-3},
    "learning rate · 4": {"learning_rate": 2e-2},
    "PyTorch's initialisation": {"initialiser": "torch"},
    "BatchNorm between the parts": {"norm": True},
    "twice the width": {"width": 32},
    "rank 4": {"rank": 4},
    "no regularisers": UNREGULARISED,
    "no regularisers, BatchNorm between the parts": UNREGULARISED | {"norm": True},
    "no regularisers, twice the width": UNREGULARISED | {"width": 32},
    "no regularisers, BatchNorm between the parts, twice the width": UNREGULARISED
    | {"norm": True, "width": 32},
}
"""What is changed in the original's recipe, for channel selection on all images."""


def settings_of(data: DataSettings, epochs: int) -> Mapping[str, Settings]:
    """Both convolutions on few images and on all, unregularised; then factor by factor.

    Raises:
        ValueError: if there are less than few.
    """
    if data.train_images is not None and data.train_images < FEW:
        raise ValueError(f"train_images={data.train_images} must be at least {FEW} for this study")
    recipe = RECIPES["original"]
    base = Settings(data=data, training=dataclasses.replace(recipe, epochs=epochs))
    few = Settings(
        data=dataclasses.replace(data, train_images=FEW),
        training=dataclasses.replace(recipe, epochs=FEW_EPOCHS_FACTOR * epochs),
    )
    found = {}
    for conv in ("subkernel", "chansel"):
        label = f"{conv}, {FEW} images, no regularisers"
        found[label] = changed(few, UNREGULARISED | {"conv": conv})
    found["subkernel, as the original"] = changed(base, {"conv": "subkernel"})
    found["subkernel, no regularisers"] = changed(base, UNREGULARISED | {"conv": "subkernel"})
    for label, changes in FACTORS.items():
        found[f"chansel, {label}"] = changed(base, changes)
    return found


def note(epochs: int) -> str:
    """Why some trainings are longer."""
    steps = FEW // RECIPES["original"].batch_size
    return (
        f"Networks that see {FEW} images only are trained for {FEW_EPOCHS_FACTOR} times as many "
        f"epochs, {FEW_EPOCHS_FACTOR * epochs} for `--epochs={epochs}`, because an epoch of so few "
        f"images has {steps} steps."
    )


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Train accuracy on plain images, and validation accuracy, of every row."""
    picture = Figure(figsize=(10, 1.1 + 0.34 * len(outcomes)), layout="constrained")
    axes = picture.add_subplot()
    places = range(len(outcomes))
    train, validation = (
        [100 * outcome.mean(name) for outcome in outcomes]
        for name in ("plain_train_accuracy", "final_val_accuracy")
    )
    axes.plot(train, places, "o", label="train", color="tab:blue")
    axes.plot(validation, places, "s", label="validation", color="tab:orange")
    for place, *values in zip(places, train, validation, strict=True):
        for value, side, offset in ((min(values), "right", -7), (max(values), "left", 7)):
            axes.annotate(
                f"{value:.1f}",
                (value, place),
                xytext=(offset, 0),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=7,
            )
    axes.set_yticks(places, [outcome.label for outcome in outcomes])
    axes.set_ylim(len(outcomes) - 0.5, -0.5)  # the first on top
    axes.margins(x=0.12)  # for the numbers
    axes.grid(alpha=0.3)
    axes.set(xlabel="accuracy after the last epoch, %")
    picture.legend(loc="outside upper right", ncols=2)
    return picture


STUDY = Study(
    question="Can channel selection overfit at all, and what stops the original's network?",
    epochs=100,
    entries=settings_of,
    draw=draw,
    note=note,
    scored=("train",),
)
