"""Keeps tensorflow-datasets from printing."""

import contextlib
import logging
import sys
from collections.abc import Iterator

import tensorflow_datasets as tfds


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
