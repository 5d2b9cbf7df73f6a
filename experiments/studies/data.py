"""The comparison on all ten classes of CIFAR-10, beside BSConv's."""

import dataclasses
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from chansel_jax.training.optimizer import OptimizerSettings
from experiments.reporting import plots
from experiments.studies.study import Study
from experiments.studies.sweep import Outcome, changed, entries
from experiments.training.settings import DataSettings, Settings, TrainingSettings

NETWORKS = ("subkernel", "chansel", "chansel-w32")
# Those of the package bsconv, of which some are published.
MODELS = ("cifar_wrn16_1", "cifar_wrn16_2", "cifar_resnet20")

# Haase and Amthor, "Rethinking Depthwise Separable Convolutions" (CVPR 2020): the recipe, at 200
# epochs, and the accuracies.
RECIPE = TrainingSettings(
    optimization=OptimizerSettings(
        optimizer="sgd",
        learning_rate=0.1,
        schedule="step",
        warmup_fraction=0.0,
        momentum=0.9,
        weight_decay=1e-4,
        undecayed=(),
    ),
    epochs=200,
    dropout_rate=0.0,
)
STEPS_AT = (0.5, 0.75, 0.9)
PUBLISHED = (
    ("WRN-16-1, dense", "0.18 M", "91.11 %"),
    ("WRN-16-1, BSConv-U", "0.03 M", "89.09 %"),
    ("WRN-16-2, BSConv-U", "0.10 M", "91.83 %"),
)


def settings_of(data: DataSettings, epochs: int) -> Mapping[str, Settings]:
    """Both convolutions, in our network and in others; of ours the double width too."""
    optimization = dataclasses.replace(RECIPE.optimization, step_epochs=step_epochs(epochs))
    training = dataclasses.replace(RECIPE, epochs=epochs, optimization=optimization)
    base = Settings(data=data, training=training)
    others = {
        f"{model}, {conv}": changed(base, {"model": model, "conv": conv})
        for model in MODELS
        for conv in NETWORKS[:2]
    }
    return entries(NETWORKS, base) | others


def step_epochs(epochs: int) -> tuple[int, ...]:
    """After which the learning rate falls, at `STEPS_AT` or the nearest whole epoch."""
    return tuple(sorted({max(1, round(share * epochs)) for share in STEPS_AT}))


def note(epochs: int) -> str:
    """When the learning rate falls."""
    steps = step_epochs(epochs)
    here = ", ".join(f"{step / epochs:.0%}" for step in steps)
    published = ", ".join(f"{share:.0%}" for share in STEPS_AT)
    return (
        f"The learning rate was divided by ten after {here} of the epochs (epochs "
        f"{', '.join(map(str, steps))}); the published recipe does so after {published}."
    )


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Losses and accuracies by epoch, and the published accuracies."""
    levels = {
        f"{label}, test images": float(accuracy.rstrip(" %")) / 100
        for label, _, accuracy in STUDY.published_beside(outcomes)
    }
    return plots.curves({o.label: [run.metrics for run in o.runs] for o in outcomes}, levels)


STUDY = Study(
    question="Does it hold on all ten classes of CIFAR-10, with a published recipe?",
    epochs=200,
    entries=settings_of,
    draw=draw,
    note=note,
    dataset="cifar10",
    scored=("validation", "test"),
    reference=NETWORKS[0],
    published=PUBLISHED,
    published_note=(
        "Haase and Amthor (CVPR 2020), 200 epochs of all 50,000 training images, on CIFAR-10's "
        "test images"
    ),
)
