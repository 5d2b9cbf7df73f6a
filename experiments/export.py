"""Writes a trained network to files that other programs read: StableHLO, safetensors, ONNX.

python -m experiments.export --workdir=RUN
"""

import dataclasses
import importlib.util
import textwrap
from pathlib import Path

import numpy as np
from rich.console import Console

from chansel_jax.files import replaced
from experiments.cli.command import check_output, run
from experiments.cli.console import make_console
from experiments.cli.errors import CommandError
from experiments.cli.flags import check_different
from experiments.exporting.card import BEGINNING, model_card
from experiments.exporting.formats import FORMATS, Name, Predict, code, in_float32, predict_of
from experiments.studies.runs import record_of
from experiments.training.load import Checkpoint, Run, data_settings, load_run, readable
from experiments.training.workdir import refuse_among_images

TOLERANCE = 1e-5  # between probabilities
CARD = "README.md"


@dataclasses.dataclass(frozen=True)
class Settings:
    """Exports the network of a finished run, reads what it wrote, and compares predictions."""

    workdir: Path
    """The network of the run in this folder is exported; what is exported computes in float32."""
    format: tuple[Name, ...] = tuple(FORMATS)
    """These files are written: a program of JAX (StableHLO), the parameters (safetensors), a
    program for ONNX Runtime; a model card is written beside them."""
    epoch: Checkpoint = "best"
    """The network has the parameters of this checkpoint: best (the lowest validation loss), last,
    or the number of an epoch that was kept."""
    output: Path | None = None
    """The files are written to this folder, by default WORKDIR/export; those of an earlier export
    are replaced."""

    def __post_init__(self):
        check_different("format", self.format, "formats")


def main(settings: Settings) -> None:
    """Exports the network and prints what was written."""
    export(settings, make_console())


def export(settings: Settings, console: Console) -> None:
    """Writes each format and the model card, each file as a whole.

    Raises:
        CommandError: if the run cannot be had or is not finished, a package is missing, nothing can
            be written, or a file predicts something else than the run's network.
    """
    check_packages(settings.format)
    workdir = settings.workdir
    if (workdir / "config.json").is_file() and not (workdir / "summary.json").is_file():
        raise CommandError(
            f"workdir={workdir} holds a run that is not finished: there is no summary.json; "
            "experiments.train with the run's flags goes on with it"
        )
    run = load_run(workdir, settings.epoch, console.print)
    trained = in_float32(run)
    output = settings.output or workdir / "export"
    refuse_among_images("output", output, data_settings(trained, None))
    with readable(f"the run in {workdir}"):
        card = model_card(trained, record_of(workdir), settings.format)
    check_output(output)
    check_card(output / CARD)
    if trained is not run:
        difference = predictions_differ(
            predict_of(trained, trained.network), predict_of(run, run.network), trained
        )
        console.print(
            f"the run computes in {run.settings.network.dtype}, and what is exported in float32: "
            f"probabilities of three random images differ by up to {difference:.1e}"
        )
    output.mkdir(parents=True, exist_ok=True)
    for name in settings.format:
        path = output / FORMATS[name].file
        with replaced(path) as partial:  # a file that differs does not get there
            FORMATS[name].save(trained, partial)
            compare(name, partial, trained)
        console.print(f"{path}: {path.stat().st_size:,} bytes; it predicts as the run's network")
        console.print(textwrap.indent(code(name, trained), "    "), markup=False, highlight=False)
    with replaced(output / CARD) as partial:
        partial.write_text(card, encoding="utf-8")
    console.print(f"{output / CARD} says what it is, how good it is, and how to load it")


def check_card(path: Path) -> None:
    """Raises `CommandError` if `path` is there, and no model card of an earlier export."""
    if path.exists() and not path.read_bytes().startswith(BEGINNING.encode()):
        raise CommandError(f"{path} is no model card of an earlier export, and is not replaced")


def check_packages(formats: tuple[Name, ...]) -> None:
    """Raises `CommandError` if a package that one of `formats` needs is not installed."""
    for name in formats:
        for package in FORMATS[name].packages:
            if importlib.util.find_spec(package) is None:
                raise CommandError(
                    f"format={name} needs the package {package}, which is not installed: "
                    'pip install -e ".[export]"'
                )


def compare(name: Name, path: Path, trained: Run) -> None:
    """Raises `CommandError` if what the file predicts is not what the network of the run does."""
    predict, expected = FORMATS[name].load(trained, path), predict_of(trained, trained.network)
    difference = predictions_differ(predict, expected, trained)
    if not difference <= TOLERANCE:
        raise CommandError(
            f"format={name}: the file's probabilities differ by {difference:.1e} from those of "
            f"the run's network, more than {TOLERANCE:.0e}; it is not written"
        )


def predictions_differ(predict: Predict, expected: Predict, run: Run) -> float:
    """The largest difference between probabilities, of three random images at once and of one."""
    rng = np.random.default_rng(0)
    images = rng.normal(run.mean, run.std, (3, *run.image_shape)).clip(0, 255).astype(np.uint8)
    return max(np.abs(predict(few) - expected(few)).max() for few in (images, images[:1]))


if __name__ == "__main__":
    run(main, Settings, "export")
