"""How good a trained network is, class by class.

python -m experiments.evaluate --workdir=RUN
"""

import dataclasses
from pathlib import Path
from typing import Literal

from rich.console import Console

from chansel_jax.training.prediction import Scores
from experiments.cli.command import check_output, run
from experiments.cli.console import make_console
from experiments.reporting import plots, tables
from experiments.reporting.network_pictures import kernels, mistakes
from experiments.training.load import Checkpoint, Run, data_settings, load_run
from experiments.training.scores import Wanted, measure, share_or_none
from experiments.training.workdir import refuse_among_images


@dataclasses.dataclass(frozen=True)
class Settings:
    """Loss, accuracy, precision and recall of a run's network, and its confusion matrix."""

    workdir: Path
    """The run in this folder is evaluated."""
    split: Literal["train", "validation", "test"] = "validation"
    """Its network is evaluated on these of its images."""
    data_dir: Path | None = None
    """The images are found here; by default where they were when the run was trained."""
    epoch: Checkpoint = "best"
    """The network has the parameters of this checkpoint: best (the lowest validation loss), last,
    or the number of an epoch that was kept."""
    flip_average: bool = False
    """The probabilities of every image and its mirror image are averaged."""
    output: Path | None = None
    """evaluation-SPLIT.json, confusion-SPLIT.png, mistakes-SPLIT.png (the images that are furthest
    from right) and kernels.png (the depthwise kernels) are written to this folder, by default the
    run's; with --flip-average SPLIT is followed by -flip-averaged."""


def main(settings: Settings) -> None:
    """Evaluates the run and prints what comes out."""
    evaluate(settings, make_console())


def evaluate(settings: Settings, console: Console) -> Scores:
    """Evaluates, prints, and writes the figures and the pictures.

    Raises:
        CommandError: if the run or the images cannot be had, or there is no such split.
    """
    trained = load_run(settings.workdir, settings.epoch, console.print)
    output = settings.output or settings.workdir
    refuse_among_images("output", output, data_settings(trained, settings.data_dir))
    check_output(output)
    wanted = Wanted(settings.split, settings.epoch, settings.flip_average)
    found, images = measure(trained, wanted, settings.data_dir, output, console)
    print_scores(found, trained, console)
    title = f"{settings.split}, epoch {trained.epoch}, {found.accuracy:.2%}"
    names = trained.class_names
    pictures = {
        f"confusion-{wanted.name}": plots.confusion_matrices({title: found.confusion}, names),
        f"mistakes-{wanted.name}": mistakes(images.images, images.labels, found, names),
        "kernels": kernels(trained.network),
    }
    for name, picture in pictures.items():
        if picture:
            plots.save(picture, output / f"{name}.png")
        else:  # that of an earlier checkpoint would be taken for this one's
            (output / f"{name}.png").unlink(missing_ok=True)
    console.print(f"the results are written to {output}")
    return found


def print_scores(found: Scores, trained: Run, console: Console) -> None:
    """A row a class: precision, recall, and, of few classes, what its images were taken for."""
    taken_for = trained.class_names if len(trained.class_names) <= plots.FEW_CLASSES else ()
    headings = ["class", "images", "precision", "recall", *taken_for]
    precision, recall = (share_or_none(values) for values in (found.precision, found.recall))
    rows = []
    for i, name in enumerate(trained.class_names):
        counts = found.confusion[i]
        shares = ("–" if v is None else f"{v:.2%}" for v in (precision[i], recall[i]))
        counted = (f"{count:,}" for count in counts[: len(taken_for)])
        rows.append([name, f"{counts.sum():,}", *shares, *counted])
    title = "rows: the class; columns on the right: taken for" if taken_for else ""
    tables.print_table(headings, rows, console, title)
    if not taken_for:
        console.print("the files show what each class was taken for")


if __name__ == "__main__":
    run(main, Settings, "evaluate")
