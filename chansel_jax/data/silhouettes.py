"""Silhouettes of birds, cats and dogs, which come with this package.

They are in silhouettes.npz beside this module; silhouettes.LICENSE.txt says where they are from.
"""

import collections
import importlib.resources

import numpy as np

from chansel_jax.data.source import Content, Source, choose_per_class

CLASS_NAMES = ("bird", "cat", "dog")
PADDING = 2  # from 28 x 28 to 32 x 32; the background is 0
SPLIT_SEED = 0
VALIDATION_SHARE = 5  # one image in five


def silhouettes() -> Source:
    """The source of 3,000 silhouettes, (32, 32, 3) uint8, 80 % train and 20 % validation."""
    return Source("silhouettes", lambda download_dir: _read())


def _read() -> Content:
    stored = importlib.resources.files(__package__) / "silhouettes.npz"
    with stored.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    train, validation = divide(images, labels)
    margins = ((0, 0), (PADDING, PADDING), (PADDING, PADDING))
    rgb = np.repeat(np.pad(images, margins)[..., None], 3, axis=-1)
    return Content(
        class_names=CLASS_NAMES,
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
