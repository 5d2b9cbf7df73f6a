"""Predicts the classes of images in a folder, as competitions want them.

python -m experiments.predict --workdir=RUN --images=FOLDER --output=submission.csv
"""

import collections
import csv
import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from rich.console import Console

from chansel_jax.data import DataError
from chansel_jax.data.image_files import files_below, read_image
from chansel_jax.errors import listed
from chansel_jax.files import replaced
from chansel_jax.training.prediction import BATCH_SIZE, make_predict
from experiments.cli.command import run
from experiments.cli.console import make_console, tracked
from experiments.cli.errors import CommandError
from experiments.reporting.tables import counted
from experiments.training.load import Checkpoint, Run, load_run


@dataclasses.dataclass(frozen=True)
class Settings:
    """Predicts the class of every image in a folder and writes one row a file."""

    workdir: Path
    """The network of the run in this folder predicts."""
    images: Path
    """The images in this folder, and in those below it, are classified; those of another size are
    resized and cropped."""
    output: Path = Path("submission.csv")
    """The predictions are written to this file, which is replaced if it is there."""
    columns: tuple[str, ...] = ("id", "label")
    """These are the headings of the column of file names (without extensions where that is enough)
    and of the column of classes."""
    labels: Literal["name", "index"] = "name"
    """Classes are written by name, or by number from 0 in the order of the run."""
    probabilities: bool = False
    """In place of the class there is a column for each class with its probability; --columns then
    gives the first heading only."""
    flip_average: bool = False
    """The probabilities of every image and its mirror image are averaged."""
    epoch: Checkpoint = "best"
    """The network has the parameters of this checkpoint: best (the lowest validation loss), last,
    or the number of an epoch that was kept."""

    def __post_init__(self):
        needed = 1 if self.probabilities else 2
        if len(self.columns) < needed or len(self.columns) > 2 or len(set(self.columns)) < needed:
            raise ValueError(
                f"columns={','.join(self.columns)} must be two different headings, as in id,label"
            )


def main(settings: Settings) -> None:
    """Predicts and prints how it goes."""
    predict(settings, make_console())


def predict(settings: Settings, console: Console) -> None:
    """Writes the predictions of all images that can be read.

    Raises:
        CommandError: if the run cannot be loaded, nothing can be written, there is no image; and,
            once all others are predicted and written, if a file is no image.
    """
    if settings.output.is_dir() or not settings.output.name:
        raise CommandError(f"output={settings.output} is a folder")
    files = find_files(settings.images, settings.output)
    trained = load_run(settings.workdir, settings.epoch, console.print)
    console.print(f"{len(files):,} files; the parameters are those of epoch {trained.epoch}")
    try:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        with (
            replaced(settings.output) as partial,
            partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            # For a name that holds a carriage return, which Python 3.11 leaves unquoted.
            quoted = csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)
            plain = csv.writer(file, lineterminator="\n")
            by_name = settings.labels == "name"
            classes = list(trained.class_names if by_name else range(len(trained.class_names)))
            headings = [*settings.columns[:1], *classes]
            plain.writerow(headings if settings.probabilities else settings.columns)
            written = 0
            names, bad = row_names(files, settings.images), []
            for paths, found in predictions(settings, trained, files, bad, console):
                for path, probabilities in zip(paths, found, strict=True):
                    cells = [classes[probabilities.argmax()]]
                    if settings.probabilities:
                        cells = [f"{probability:.6f}" for probability in probabilities]
                    writer = quoted if "\r" in names[path] else plain
                    writer.writerow([names[path], *cells])
                written += len(paths)
            if not written:
                raise CommandError(f"images={settings.images} holds no image that can be read")
    except OSError as error:
        raise CommandError(f"output={settings.output}: {error.strerror or error}") from error
    console.print(f"written to {settings.output}: {counted(written, 'prediction')}")
    if bad:
        names = listed([path.name for path in bad])
        raise CommandError(f"{len(bad)} of {len(files)} files are not predicted: {names}")


def find_files(root: Path, output: Path) -> list[Path]:
    """All files under `root` but hidden ones and `output`, sorted; links are followed.

    Raises:
        CommandError: if there is none.
    """
    if not root.is_dir():
        raise CommandError(f"images={root} is not a folder")
    written = os.path.realpath(output)  # by an earlier call
    files = sorted(path for path in files_below(root) if os.path.realpath(path) != written)
    if not files:
        raise CommandError(f"images={root} holds no files")
    return files


def row_names(files: Sequence[Path], root: Path) -> dict[Path, str]:
    """What each file is called: its path below `root`, without an image's extension.

    Images that would be called like another file keep theirs.
    """
    extensions = Image.registered_extensions()
    whole = {path: path.relative_to(root) for path in files}
    short = {
        path: name.with_suffix("") if name.suffix.lower() in extensions else name
        for path, name in whole.items()
    }
    shortened = [path for path in files if short[path] != whole[path]]
    count = collections.Counter([*short.values(), *(whole[path] for path in shortened)])
    return {
        path: (name if count[name] == 1 else whole[path]).as_posix() for path, name in short.items()
    }


def predictions(
    settings: Settings, trained: Run, files: Sequence[Path], bad: list[Path], console: Console
) -> Iterator[tuple[list[Path], np.ndarray]]:
    """Images and their probabilities `(n, classes)`, batch by batch.

    Files that cannot be read are printed and added to `bad`.
    """
    options = {"flip_average": settings.flip_average}
    function = make_predict(trained.network, trained.mean, trained.std, **options)

    def read(path: Path) -> np.ndarray | DataError:
        try:
            return read_image(path, trained.image_shape[:2])
        except DataError as error:
            return error

    starts = range(0, len(files), BATCH_SIZE)
    with ThreadPoolExecutor() as pool:
        for start in tracked(starts, "predicting", console):
            paths = files[start : start + BATCH_SIZE]
            readable, images = [], []
            for path, image in zip(paths, pool.map(read, paths), strict=True):
                if isinstance(image, DataError):
                    console.print(f"no image: {image}")
                    bad.append(path)
                else:
                    readable.append(path)
                    images.append(image)
            if images:
                yield readable, function(np.stack(images))


if __name__ == "__main__":
    run(main, Settings, "predict")
