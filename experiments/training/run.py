"""A training run from its settings to its summary."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from chansel_jax.conv import lowerings_taken
from chansel_jax.counting import LayerCount, count_network
from chansel_jax.digest import digest
from chansel_jax.files import write_json
from chansel_jax.networks.resnet import CONVS, ResNet
from chansel_jax.ops import native
from chansel_jax.training import checkpoint
from chansel_jax.training.distillation import Teacher
from experiments.cli.errors import CommandError
from experiments.cluster import coordination
from experiments.reporting import machine
from experiments.training import printing, records
from experiments.training.beginning import read_beginning
from experiments.training.experiment import Experiment, build
from experiments.training.loop import Progress, train
from experiments.training.settings import Settings, decisive, network_config, run_name
from experiments.training.workdir import check, claim, refuse_among_images

# What settings are worth in the files of runs that are older than they.
BEFORE_THEY_WERE = {"settings": decisive(Settings())}


def train_and_evaluate(
    settings: Settings,
    console: Console,
    network: ResNet | None = None,
    teacher: Teacher | None = None,
) -> dict[str, Any]:
    """Trains, or goes on with, the run that `settings` describe; returns its summary.

    Args:
        settings: of the run.
        console: takes the progress.
        network: with the parameters to begin with, as in `build`, where `settings.init` names none.
        teacher: what the network learns from, as in `build`.

    Raises:
        ValueError: if a setting is wrong, naming it and its value.
        OneLineError: if the data is wrong, the workdir holds another run, no checkpoint can be
            restored, nothing can be written, or another process could not go on.
        DivergedError: if a loss or a parameter is not finite.
        Interrupted: after SIGINT or SIGTERM, when all is saved.
    """
    workdir = settings.workdir or Path("runs", run_name(settings))
    refuse_among_images("workdir", workdir, settings.data)
    checkpoint.check_workdir(workdir)
    network_config(settings, num_classes=2)  # refuses what is wrong before the images are loaded
    class_names = None
    if settings.init is not None:
        network, class_names = read_beginning(settings, console.print)
    coordination.check_equal("settings", equal_in_all_processes(settings))
    known = {"settings": decisive(settings)}
    coordination.first_alone(lambda: check(workdir, known, settings.resume, BEFORE_THEY_WERE))
    console.print(f"the images are loaded ({settings.data.dataset}), the network is made …")
    experiment = build(settings, network, teacher, class_names)
    description = experiment.describe()
    coordination.check_equal("images", description)
    try:
        with contextlib.ExitStack() as claimed:
            aside = coordination.first_alone(
                lambda: claimed.enter_context(
                    claim(
                        workdir,
                        description,
                        settings.resume,
                        BEFORE_THEY_WERE,
                        settings.data.data_dir,
                    )
                )
            )
            seen = {"config": (workdir / "config.json").exists()}
            coordination.check_equal("files in its --workdir, which all must share,", seen)
            rows = print_beginning(experiment, workdir, aside, console)
            progress = train(experiment, workdir, console)
            summary = summarise(experiment, rows, progress)
            coordination.first_alone(lambda: finish(summary, workdir))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise CommandError(
            f"{where}{error.strerror or error}; what is saved in {workdir} stays"
        ) from error
    printing.print_summary(summary, workdir, console)
    return summary


def equal_in_all_processes(settings: Settings) -> dict[str, Any]:
    """What processes must agree on to take the same steps, and to do the same between them."""
    others = {name: getattr(settings, name) for name in ("save_every_steps", "resume")}
    return decisive(settings) | others | {"input": settings.reading.input}


def finish(summary: Mapping[str, Any], workdir: Path) -> None:
    """Leaves the summary, and deletes what only an unfinished run needs."""
    write_json(workdir / "summary.json", summary)
    checkpoint.discard_unfinished(workdir)


def print_beginning(
    experiment: Experiment, workdir: Path, aside: Path | None, console: Console
) -> list[LayerCount]:
    """Prints what is trained, on what, and where it goes; returns the network's layers."""
    settings = experiment.settings
    printing.print_header(experiment.dataset, experiment.mesh.devices.ravel(), console)
    rows = count_network(
        experiment.network.config, experiment.dataset.splits["train"].images.shape[1:3]
    )
    printing.print_layers(rows, f"{settings.network.model}, multiply-adds for one image", console)
    if settings.init is not None:
        new = (
            "; the classifier is new, since the classes differ" if experiment.new_classifier else ""
        )
        console.print(f"the training begins with the parameters of {settings.init}{new}")
    if jax.default_backend() == "cpu" and not native.available():
        console.print(
            "note: the layers are not computed in C++, so an epoch takes two to three times as "
            f"long: {native.why_not()}"
        )
    console.print(f"run: {workdir}" + (f" (the one before is now {aside})" if aside else ""))
    return rows


def summarise(
    experiment: Experiment, rows: Sequence[LayerCount], progress: Progress
) -> dict[str, Any]:
    """What `summary.json` holds."""
    settings, state = experiment.settings, progress.state
    taken = lowerings_taken(experiment.network, experiment.network.config.dtype)
    return {
        "model": settings.network.model,
        "conv": settings.conv,
        "dataset": settings.data.dataset,
        "seed": settings.seed,
        "device": machine.device_name(),
        "instruction_set": native.instruction_set() if native.available() else None,
        "lowerings": {conv: taken[kind] for conv, kind in CONVS.items() if kind in taken},
        "versions": machine.versions(),
        "images": {name: len(split.labels) for name, split in experiment.dataset.splits.items()},
        "parameters": sum(row.parameters for row in rows),
        "multiply_adds": sum(row.multiply_adds for row in rows),
        **records.summarise(progress.history),
        "params_sha256": digest(tuple(state.evaluated[n] for n in ("params", "batch_stats"))),
    }
