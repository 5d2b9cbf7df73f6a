"""Differences between rows of a study whose networks were measured on the same images."""

import math
from collections.abc import Mapping

import numpy as np

Right = Mapping[int, np.ndarray]


def difference(own: Right, other: Right, *, folds: bool) -> tuple[float, float] | None:
    """How much more often one row is right than another, and the standard error of this.

    Each seed's networks are compared on the same images. Where the images are the same for all
    seeds, the error holds the choice of the images and that of the seeds, of which a single seed
    says nothing: its square is the variance of the images' means over their number, and that of the
    seeds' means over theirs, less what is left besides the two, which both of them hold. Where
    every seed has a fold of the images to itself, it is the deviation between the folds over the
    root of their number. That is a little small, since the networks of two folds have most of their
    training images in common (Bengio and Grandvalet, 2004).

    Args:
        own: by seed, which images `(N,)` bool the row's network is right about.
        other: likewise, of the row that it is compared with.
        folds: whether each seed has images of its own.

    Returns:
        Both as shares of the images; None where the rows have no seed in common.
    """
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    if folds and seeds[1:]:
        means = [np.mean(own[seed].astype(float) - other[seed]) for seed in seeds]
        return float(np.mean(means)), float(np.std(means, ddof=1) / math.sqrt(len(seeds)))
    gains = np.array([own[seed].astype(float) - other[seed] for seed in seeds])
    count, images = gains.shape
    of_images, of_seeds = gains.mean(axis=0), gains.mean(axis=1)
    square = of_images.var(ddof=1) / images
    if seeds[1:]:
        rest = gains - of_images - of_seeds[:, None] + gains.mean()
        both = (rest**2).sum() / ((images - 1) * (count - 1)) / (images * count)
        square += max(0.0, of_seeds.var(ddof=1) / count - both)
    return float(gains.mean()), math.sqrt(square)
