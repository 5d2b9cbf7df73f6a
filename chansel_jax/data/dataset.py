"""A data set in memory."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Split:
    """The images of one split.

    Attributes:
        images: (N, H, W, 3) uint8, contiguous.
        labels: (N,) int32, indices into the data set's class names.
    """

    images: np.ndarray
    labels: np.ndarray


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
