"""A data set: its splits and classes."""

import dataclasses
import functools

import numpy as np

from chansel_jax.data.errors import DataError
from chansel_jax.data.stored import StoredImages
from chansel_jax.data.summary import Summary, summarise


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split.

    Attributes:
        images: (N, H, W, 3) uint8, in memory or on disk; sliced, they are arrays.
        labels: (N,) int32, indices into the data set's class names.
        recorded: the summary, where it is known; else a pass over the images is made for it.
    """

    images: np.ndarray | StoredImages
    labels: np.ndarray
    recorded: Summary | None = None

    @functools.cached_property
    def summary(self) -> Summary:
        """Digest and channel statistics."""
        return self.recorded or summarise(self.images, self.labels)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """All splits of a data set.

    Attributes:
        name: what it was asked for by.
        class_names: the name of each label.
        splits: "train", "validation" and, where there is one, "test".
    """

    name: str
    class_names: tuple[str, ...]
    splits: dict[str, Split]


def with_random_labels(split: Split, seed: int) -> Split:
    """`split`, in which the images have each other's labels, at random by `seed`."""
    return Split(split.images, np.random.default_rng(seed).permutation(split.labels))


def first_of_each_class(split: Split, count: int, name: str) -> Split:
    """`count` images of `split`, which has that name, in its order, of each class about as many.

    Raises:
        DataError: if there are fewer.
    """
    if count > len(split.labels):
        raise DataError(
            f"{name}_images={count} must be at most the {len(split.labels)} {name} images"
        )
    # How many images of its class come before each.
    ranks = np.zeros(len(split.labels), np.int64)
    for label in np.unique(split.labels):
        of_label = split.labels == label
        ranks[of_label] = np.arange(of_label.sum())
    chosen = np.sort(np.argsort(ranks, kind="stable")[:count])
    images = split.images
    stays_stored = isinstance(images, StoredImages)
    return Split(images.select(chosen) if stays_stored else images[chosen], split.labels[chosen])
