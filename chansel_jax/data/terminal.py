"""What loading a data set shows: progress bars where the standard error is a terminal."""

import contextlib
import functools
import logging
import sys
from collections.abc import Callable, Iterator

import tensorflow_datasets as tfds
from rich.console import Console
from rich.progress import Progress, ProgressColumn


@contextlib.contextmanager
def progress_bar(
    description: str, total: int | None, *columns: ProgressColumn
) -> Iterator[Callable[[float], None]]:
    """A bar that vanishes in the end; gives the function that advances it towards `total`.

    The `columns` follow the share done and the time left; None is a total that is not known.
    """
    with Progress(
        *Progress.get_default_columns(),
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not sys.stderr.isatty(),
    ) as progress:
        yield functools.partial(progress.advance, progress.add_task(description, total=total))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back tensorflow-datasets' warnings, and its progress bars where no terminal is.

    The warnings concern none of its users here; bars in a file are no help.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        tfds.enable_progress_bar()
