"""Images of a prepared data set that stay on disk until they are asked for."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from chansel_jax.data.errors import DataError
from chansel_jax.data.terminal import quiet


class StoredImages:
    """The images of a split in array_record files, decoded one by one.

    It is indexed as an array along its first axis: a number gives `(H, W, 3)`, a slice or an array
    `(n, H, W, 3)`. Pickled, it is only the names of the files: every process opens its own.

    Args:
        folder: of the prepared data set.
        split: its name.
        image_shape: `(H, W, 3)`.
        index: `(N,)`, the number in the files of each image.

    Attributes:
        shape: `(N, H, W, 3)`.
        dtype: uint8.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: Path, split: str, image_shape: tuple[int, ...], index: np.ndarray):
        self.folder, self.split, self.index = folder, split, index
        self.shape = (len(index), *image_shape)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Any) -> np.ndarray:
        numbers = self.index[key]
        with unreadable(self.folder):
            records = self._records.__getitems__(np.ravel(numbers).tolist())
        found = [record["image"] for record in records]
        return np.reshape(found, (*np.shape(numbers), *self.shape[1:])).astype(self.dtype)

    def select(self, key: Any) -> "StoredImages":
        """Those that `self[key]` would read, still on disk."""
        return StoredImages(self.folder, self.split, self.shape[1:], self.index[key])

    def __reduce__(self):
        return StoredImages, (self.folder, self.split, self.shape[1:], self.index)

    @functools.cached_property
    def _records(self) -> Any:
        with quiet():
            records = tfds.builder_from_directory(self.folder).as_data_source(self.split)
            records[0]  # the first that a process decodes is remarked upon
        return records


@contextlib.contextmanager
def unreadable(folder: Path) -> Iterator[None]:
    """Any error here means that the prepared data set is broken: the readers raise all kinds."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise DataError(
            f"the prepared data set cannot be read, delete {folder} and try again: {error}"
        ) from error
