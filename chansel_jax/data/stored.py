"""Images of a prepared data set that stay on disk until they are asked for."""

import functools
import operator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from chansel_jax.data.errors import DataError
from chansel_jax.data.quiet import quiet


class StoredImages:
    """The images of a split in array_record files, decoded one by one.

    It is indexed as an array: a number gives `(H, W, 3)`, a slice or an array of numbers
    `(n, H, W, 3)`. Pickled, it is only the names of the files: every process opens its own.

    Attributes:
        shape: `(N, H, W, 3)`.
        dtype: uint8.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, folder: Path, split: str, shape: tuple[int, int, int, int]):
        self.folder, self.split, self.shape = folder, split, shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> np.ndarray:
        if isinstance(key, slice):
            key = range(*key.indices(len(self)))
        elif not np.ndim(key):
            return self._decoded([operator.index(key)])[0]
        found = self._decoded([int(index) for index in key])
        return np.stack(found) if found else np.empty((0, *self.shape[1:]), self.dtype)

    def __reduce__(self):
        return StoredImages, (self.folder, self.split, self.shape)

    @functools.cached_property
    def _records(self) -> Any:
        with quiet():
            records = tfds.builder_from_directory(self.folder).as_data_source(self.split)
            records[0]  # the first that a process decodes is remarked upon
        return records

    def _decoded(self, indices: list[int]) -> list[np.ndarray]:
        try:
            return [record["image"] for record in self._records.__getitems__(indices)]
        except Exception as error:  # the readers raise all kinds
            raise DataError(
                f"the prepared data set cannot be read, delete {self.folder} and try again: {error}"
            ) from error
