"""What training needs to know of all images of a split, from one pass over them."""

import dataclasses
import hashlib
from collections.abc import Iterable

import numpy as np

from chansel_jax.digest import header

CHUNK = 1024  # images at a time


@dataclasses.dataclass(frozen=True)
class Summary:
    """Of the images and labels of a split.

    Attributes:
        digest: SHA-256, in hexadecimal, of the images and labels in order; it is
            `digest((images, labels))` of the arrays.
        mean: `(C,)` float32, the channels' means.
        std: `(C,)` float32, their standard deviations; 1 for a channel without any variation.
    """

    digest: str
    mean: np.ndarray
    std: np.ndarray


def summarise(images: np.ndarray, labels: np.ndarray) -> Summary:
    """The summary of images `(N, H, W, C)` uint8 and labels `(N,)`; `images` is sliced only."""
    chunks = (images[i : i + CHUNK] for i in range(0, len(images), CHUNK))
    return summarise_chunks(chunks, images.shape, labels)


def summarise_chunks(
    chunks: Iterable[np.ndarray], shape: tuple[int, ...], labels: np.ndarray
) -> Summary:
    """As `summarise`, of images that come in parts.

    Args:
        chunks: the images `(n, H, W, C)` uint8, in order.
        shape: `(N, H, W, C)` of all together.
        labels: `(N,)`; they may be filled in while the chunks come.
    """
    sha = hashlib.sha256(header("[0]", np.dtype(np.uint8), tuple(shape)))
    histogram = np.zeros((shape[-1], 256), np.int64)
    for chunk in chunks:
        sha.update(np.ascontiguousarray(chunk))
        for channel, counts in enumerate(histogram):
            counts += np.bincount(chunk[..., channel].ravel(), minlength=256)
    sha.update(header("[1]", labels.dtype, labels.shape))
    sha.update(labels.tobytes())
    shares = histogram / histogram.sum(axis=1, keepdims=True)
    levels = np.arange(256.0)
    mean = shares @ levels
    std = np.sqrt((shares * (levels - mean[:, None]) ** 2).sum(axis=1))
    std = np.where(std > 0, std, 1).astype(np.float32)
    return Summary(sha.hexdigest(), mean.astype(np.float32), std)
