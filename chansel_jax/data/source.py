"""What every source of images hands over, and how images are divided between splits."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np


@dataclasses.dataclass(frozen=True)
class Content:
    """The images of one data set, in the order in which they are to be stored.

    Attributes:
        class_names: the name of each label.
        splits: for each split its (image, label) pairs; an image is (H, W, 3) uint8, all of
            one size. Read once, one split after another.
    """

    class_names: tuple[str, ...]
    splits: dict[str, Iterable[tuple[np.ndarray, int]]]


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set that can be prepared.

    Attributes:
        name: names the folder of the prepared data set, so two sources with different images
            must differ in it.
        read: gives the images; its argument is the folder where downloads are kept.
    """

    name: str
    read: Callable[[Path], Content]


def choose_per_class(
    labels: np.ndarray, sizes: Sequence[int], seed: int, fold: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Chooses `sizes[c]` images of each class c at random.

    Args:
        labels: (N,) labels 0, 1, ....
        sizes: how many to choose of each class.
        seed: the same seed chooses the same images.
        fold: which are the rest: other numbers give other images, until every image of a class has
            once been among the rest; 0 by default.

    Returns:
        The indices of those chosen and of the rest, each ascending.
    """
    rng = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for label, size in enumerate(sizes):
        images = rng.permutation(np.flatnonzero(labels == label))
        chosen[np.roll(images, fold * (len(images) - size))[:size]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)
