"""Turns a trained dense network into channel selection, and trains it a little further.

    python -m experiments.compress --workdir=RUN --ranks=1,2,3,4

RUN is one of experiments.train with --conv=subkernel. Every kernel is cut to its leading singular
vectors, but for those whose vectors would take more parameters. What that costs is measured as they
are cut, with the statistics of BatchNorm estimated anew, and after fine-tuning: by the labels, and
with the dense network as the teacher. The same command, typed again, goes on where it stopped.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console

from chansel_jax.conv import unwrapped
from chansel_jax.counting import count_network
from chansel_jax.data import Split
from chansel_jax.decomposition import component_energies
from chansel_jax.digest import digest
from chansel_jax.factorize import factorizable, factorize, highest_rank, recalibrate
from chansel_jax.functional import network_tree
from chansel_jax.networks.resnet import DENSE, ResNet
from chansel_jax.training.augmentation import normalise
from chansel_jax.training.distillation import Distillation, Teacher
from chansel_jax.training.optimizer import OptimizerSettings
from experiments.cli.command import run
from experiments.cli.console import make_console
from experiments.cli.errors import CommandError
from experiments.cli.flags import check_different, typed
from experiments.reporting import machine, report, tables
from experiments.studies.runs import check_runs_output, finished
from experiments.studies.sweep import folder_name
from experiments.training.load import Checkpoint, Run, data_settings, load_images, load_run
from experiments.training.scores import scores_of
from experiments.training.settings import RECIPES as TRAINING_RECIPES
from experiments.training.settings import ReadingSettings, TrainingSettings
from experiments.training.settings import Settings as TrainSettings

COMPONENTS = 4  # the table shows their energies
RECALIBRATION_BATCH = 500  # images, at most

# The columns of accuracies, and what each is called in a run's folder and in `results.json`.
WHEN = {
    "as cut": "accuracy_before",
    "recalibrated": "accuracy_recalibrated",
    "fine-tuned": "accuracy_after",
    "with the teacher": "accuracy_distilled",
}

RECIPES = {
    "fine-tuning": TrainingSettings(
        optimization=OptimizerSettings(
            optimizer="muon", learning_rate=0.02, weight_decay=5e-4, warmup_fraction=0.0
        ),
        epochs=10,
        label_smoothing=0.1,
        dropout_rate=0.0,
    )
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Factorises a run's dense network, fine-tunes it, and reports accuracy against parameters."""

    workdir: Path
    """The dense network of this run, from experiments.train --conv=subkernel, is compressed."""
    data_dir: Path | None = None
    """The images are found here; by default where they were when the run was trained."""
    epoch: Checkpoint = "best"
    """The network has the parameters of this checkpoint: best (the lowest validation loss), last,
    or the number of an epoch that was kept."""
    ranks: tuple[int, ...] = (1, 2, 3, 4, 6)
    """A network is made of each rank; convolutions that would become larger stay dense."""
    energies: tuple[float, ...] = ()
    """A network is made for each share, above 0 and at most 1: every convolution has the least rank
    that keeps this share of its energy (its squared singular values)."""
    parameter_budgets: tuple[int, ...] = ()
    """A network is made for each, with at most so many parameters: ranks grow one at a time, where
    the share of a convolution's energy gained for a parameter is the largest."""
    reading: ReadingSettings = ReadingSettings()
    training: TrainingSettings = RECIPES["fine-tuning"]
    distillation: Distillation = Distillation()
    output: Path | None = None
    """The fine-tuned runs and the report are written to this folder, by default
    WORKDIR/compressed."""

    def __post_init__(self):
        if not (self.ranks or self.energies or self.parameter_budgets):
            raise ValueError("ranks=, energies= and parameter_budgets= name nothing to make")
        for name in ("ranks", "energies", "parameter_budgets"):
            check_different(name, getattr(self, name))
        for name in ("ranks", "parameter_budgets"):
            for value in getattr(self, name):
                if value < 1:
                    raise ValueError(f"{name}={value} must be at least 1")
        for energy in self.energies:
            if not 0 < energy <= 1:
                raise ValueError(f"energies={energy} must be in (0, 1]")


def main(settings: Settings) -> None:
    """Compresses, and prints how it goes."""
    compress(settings, make_console())


def compress(settings: Settings, console: Console) -> dict[str, Any]:
    """Factorises, fine-tunes what is not yet, once and once more with the teacher, and reports.

    Returns:
        What `results.json` holds.

    Raises:
        OneLineError: if the run cannot be loaded or is none of a dense network, the images are
            others, or a training fails.
        ValueError: if a rank, energy or budget cannot be had.
    """
    dense = load_run(settings.workdir, settings.epoch, console.print)
    if dense.settings.conv != "subkernel":
        raise CommandError(
            f"workdir={settings.workdir} is a run of --conv={dense.settings.conv}, not subkernel"
        )
    dataset, others = load_images(dense, settings.data_dir)
    if others:
        raise CommandError(f"the {' and '.join(others)} images are not those of the run")
    output = settings.output or settings.workdir / "compressed"
    check_runs_output(output, data_settings(dense, settings.data_dir), "compress")
    validation = dataset.splits["validation"]
    whole = scores_of(dense.network, dense, validation).accuracy
    console.print(f"dense network, epoch {dense.epoch}: {whole:.2%} of the validation images")
    train = dataset.splits["train"]
    found = []
    for label, network in factorised(dense.network, settings).items():
        again = recalibrate(network, batches(train, dense))
        accuracies = [scores_of(each, dense, validation).accuracy for each in (network, again)]
        cut, recalibrated = (f"{accuracy:.2%}" for accuracy in accuracies)
        console.print(f"\n{label}: {cut} as cut, {recalibrated} recalibrated")
        summaries = fine_tuned(dense, settings, label, network, console)
        accuracies += [summary["final_val_accuracy"] for summary in summaries]
        found.append(
            {
                "label": label,
                "ranks": network.config.ranks,
                "parameters": summaries[0]["parameters"],
                **dict(zip(WHEN.values(), accuracies, strict=False)),
            }
        )
    results = results_of(found, dense, whole, settings)
    report.publish(
        output,
        "From dense to channel selection",
        text(results, settings.training.epochs),
        {"accuracy": draw(results)},
        results,
        [accuracy_table(results), energy_table(results)],
        console,
    )
    return results


def fine_tuned(
    dense: Run, settings: Settings, label: str, network: ResNet, console: Console
) -> list[Mapping[str, Any]]:
    """The summaries of the runs that begin with `network`: without the teacher, and with it."""
    output = settings.output or settings.workdir / "compressed"
    given = fine_tuning(dense, settings, network)
    teachers = {folder_name(label): None}
    if settings.distillation.distillation_weight:
        taught = f"{folder_name(label)}-distilled"
        teachers[taught] = Teacher(dense.network, settings.distillation)
    return [
        finished(output, name, given, console, network=network, teacher=teacher).summary
        for name, teacher in teachers.items()
    ]


def batches(images: Split, run: Run) -> Iterator[jnp.ndarray]:
    """All of `images` but for a few that are left over, normalised as those of `run`."""
    count = len(images.labels)
    size = count // -(-count // RECALIBRATION_BATCH)
    mean, std = jnp.asarray(run.mean), jnp.asarray(run.std)
    for start in range(0, count - size + 1, size):
        yield normalise(jnp.asarray(images.images[start : start + size]), mean, std)


def factorised(network: ResNet, settings: Settings) -> dict[str, ResNet]:
    """The networks that `settings` ask for, by label.

    Raises:
        CommandError: if a rank, an energy or a budget is so high that every convolution would stay
            dense.
        ValueError: if an energy or a budget cannot be had.
    """
    asked = {f"rank {rank}": {"rank": rank} for rank in settings.ranks}
    asked |= {f"energy {energy}": {"energy": energy} for energy in settings.energies}
    asked |= {f"budget {most}": {"parameter_budget": most} for most in settings.parameter_budgets}
    highest = max(map(highest_rank, factorizable(network).values()))
    for rank in settings.ranks:
        if rank > highest:
            raise CommandError(
                f"ranks={rank} must be at most {highest}: above it every convolution would become "
                "larger, and stays dense"
            )
    found = {label: factorize(network, **choice) for label, choice in asked.items()}
    for label, factored in found.items():
        if unwrapped(factored.config.conv) in DENSE:
            raise CommandError(f"{label}: every convolution would become larger, and stays dense")
    return found


def fine_tuning(dense: Run, settings: Settings, network: ResNet) -> TrainSettings:
    """The settings of the training that begins with `network`."""
    config = network.config
    changes = {"rank": 1, "ranks": config.ranks, "replaced": config.replaced}
    return dataclasses.replace(
        dense.settings,
        conv="chansel",
        network=dataclasses.replace(dense.settings.network, **changes),
        data=data_settings(dense, settings.data_dir),
        reading=settings.reading,
        training=settings.training,
    )


def results_of(
    found: Sequence[Mapping[str, Any]], dense: Run, whole: float, settings: Settings
) -> dict[str, Any]:
    """What `results.json` holds of the factorised networks, and of the dense one."""
    layers = count_network(dense.network.config, dense.image_shape[:2])
    trained = dataclasses.replace(dense.settings, data=data_settings(dense, settings.data_dir))
    return {
        "command": typed("compress", settings, RECIPES),
        "written_with": machine.versions(),
        "dense": {
            "command": typed("train", trained, TRAINING_RECIPES),
            "epoch": dense.epoch,
            "parameters_sha256": digest(network_tree(dense.network)),
            "parameters": sum(row.parameters for row in layers),
            "accuracy": whole,
        },
        "compressed": found,
        "energies": {
            path: component_energies(np.asarray(layer.kernel[...])).tolist()
            for path, layer in factorizable(dense.network).items()
        },
    }


def accuracy_table(results: Mapping[str, Any]) -> tables.Table:
    """A row for each network, with its accuracies."""
    measured = {when: key for when, key in WHEN.items() if key in results["compressed"][0]}
    headings = ["", "parameters", "ranks", *measured]
    dense = results["dense"]
    blank = [""] * (len(measured) - 1)
    rows = [["dense", f"{dense['parameters']:,}", "", f"{dense['accuracy']:.2%}", *blank]]
    for each in results["compressed"]:
        accuracies = (f"{each[key]:.2%}" for key in measured.values())
        ranks = " ".join(map(str, each["ranks"]))
        rows.append([each["label"], f"{each['parameters']:,}", ranks, *accuracies])
    return headings, rows


def energy_table(results: Mapping[str, Any]) -> tables.Table:
    """Each layer's share of energy in its first components, and their mean."""
    headings = ["layer", "first", *(f"first {count}" for count in range(2, COMPONENTS + 1))]
    kept = {path: np.cumsum(shares)[:COMPONENTS] for path, shares in results["energies"].items()}
    padded = {path: np.pad(k, (0, COMPONENTS - len(k)), mode="edge") for path, k in kept.items()}
    padded["mean"] = np.mean(list(padded.values()), axis=0)
    return headings, [[path, *(f"{k:.1%}" for k in shares)] for path, shares in padded.items()]


def text(results: Mapping[str, Any], epochs: int) -> str:
    """The report."""
    dense = results["dense"]
    distilled = "accuracy_distilled" in results["compressed"][0]
    taught = ", by the labels alone and with the dense network as the teacher" if distilled else ""
    return f"""\
Each row but the first is a network of channel selection, made from the kernels of one trained \
dense network (epoch {dense["epoch"]}) by singular value decomposition; at rank 0 a convolution \
has stayed dense. The table shows the accuracy on the validation images as the kernels are cut, \
with the statistics of BatchNorm estimated anew on the training images, and after \
{tables.counted(epochs, "epoch")} of fine-tuning{taught}.

{tables.table(*accuracy_table(results))}

![accuracy against parameters](accuracy.png)

This is how much of each trained kernel is in its leading components: their share of the energy, \
which is the sum of the squared singular values.

{tables.table(*energy_table(results))}

```bash
{results["command"]}
```

The dense network was trained by:

```bash
{dense["command"]}
```
"""


def draw(results: Mapping[str, Any]) -> Figure:
    """Accuracy against parameters, one line for each way to come to it."""
    picture = Figure(figsize=(7, 4.4), layout="constrained")
    axes = picture.add_subplot()
    points = sorted(results["compressed"], key=lambda each: each["parameters"])
    sizes = [each["parameters"] for each in points]
    for when, key in WHEN.items():
        if key in points[0]:
            axes.plot(sizes, [each[key] for each in points], "o-", label=when)
    above = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 7}
    for each in points:
        axes.annotate(each["label"], (each["parameters"], each["accuracy_after"]), **above)
    size, whole = results["dense"]["parameters"], results["dense"]["accuracy"]
    axes.plot([size], [whole], "k*", markersize=11, label="dense network")
    axes.axhline(whole, color="black", linewidth=0.6, linestyle=":")
    axes.set(xscale="log", xlabel="parameters", ylabel="validation accuracy")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return picture


if __name__ == "__main__":
    run(main, Settings, "compress", RECIPES)
