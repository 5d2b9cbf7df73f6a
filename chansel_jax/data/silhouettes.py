"""Silhouettes of birds, cats and dogs from the package animal-shape-mnist."""

import collections
import gzip
import importlib.resources
import io
import pickle

import numpy as np

from chansel_jax.data.errors import DataError
from chansel_jax.data.source import Content, Source, choose_per_class

CLASS_LABELS = {"bird": 1, "cat": 2, "dog": 5}  # the labels that the package gives them
IMAGES_FILE = "animal_data_version_3.gz"
LABELS_FILE = "animal_label_version_3.gz"
STORED = 10_000  # silhouettes of ten animals in the package
STORED_SIZE = 28
PADDING = 2  # from 28 x 28 to 32 x 32; the background is 0
SPLIT_SEED = 0
VALIDATION_SHARE = 5  # one image in five


def silhouettes() -> Source:
    """The source of 3,000 silhouettes, (32, 32, 3) uint8, 80 % train and 20 % validation."""
    return Source("silhouettes", lambda download_dir: read_silhouettes())


def read_silhouettes() -> Content:
    """Reads, pads and divides the silhouettes.

    Raises:
        DataError: the package is missing or holds something else.
    """
    all_images = _load_array(IMAGES_FILE, (STORED, STORED_SIZE, STORED_SIZE), np.uint8)
    all_labels = _load_array(LABELS_FILE, (STORED,), np.int64)
    wanted = np.isin(all_labels, list(CLASS_LABELS.values()))
    images = all_images[wanted]
    labels = np.searchsorted(list(CLASS_LABELS.values()), all_labels[wanted])
    train, validation = divide(images, labels)

    margins = ((0, 0), (PADDING, PADDING), (PADDING, PADDING))
    rgb = np.repeat(np.pad(images, margins)[..., None], 3, axis=-1)
    return Content(
        class_names=tuple(CLASS_LABELS),
        splits={
            "train": zip(rgb[train], labels[train], strict=True),
            "validation": zip(rgb[validation], labels[validation], strict=True),
        },
    )


def divide(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of train and validation, of (N, H, W) images; one in five of each class validates.

    The validation images are chosen among those without a copy or mirror image, so no pair
    can be torn apart.
    """
    keys = [min(image.tobytes(), image[:, ::-1].tobytes()) for image in images]
    counts = collections.Counter(keys)
    single = np.flatnonzero([counts[key] == 1 for key in keys])
    sizes = np.bincount(labels) // VALIDATION_SHARE
    validation = single[choose_per_class(labels[single], sizes, SPLIT_SEED)[0]]
    return np.setdiff1d(np.arange(len(labels)), validation), validation


def _load_array(file_name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    try:
        # The package's own modules import TensorFlow: its files are only looked up.
        folder = importlib.resources.files("animal_shape_mnist") / "data" / "Animal Shape"
        pickled = gzip.decompress((folder / file_name).read_bytes())
        array = _ArrayUnpickler(io.BytesIO(pickled)).load()
    except ModuleNotFoundError as error:
        raise DataError(
            "the silhouettes need the package animal-shape-mnist: pip install animal-shape-mnist"
        ) from error
    except Exception as error:  # a broken pickle can raise almost anything
        raise _unexpected(file_name, error) from error
    if not isinstance(array, np.ndarray) or (array.shape, array.dtype) != (shape, dtype):
        raise _unexpected(file_name, f"it is no {shape} array of {dtype.__name__}")
    return array


def _unexpected(file_name: str, reason: object) -> DataError:
    return DataError(
        f"{file_name} of the package animal-shape-mnist cannot be read ({reason}): "
        "pip install --force-reinstall animal-shape-mnist"
    )


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what NumPy arrays are pickled as, and nothing else.

    NumPy 2 has moved the first of the three and would warn about its old place.
    """

    _ADMITTED = {
        ("numpy.core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in self._ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self._ADMITTED[module, name]
