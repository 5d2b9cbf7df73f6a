"""Differences between rows of a study whose networks were measured on the same images."""

import math
from collections.abc import Mapping

import numpy as np

Right = Mapping[int, np.ndarray]


def difference(own: Right, other: Right, *, folds: bool) -> tuple[float, float] | None:
    """How much more often one row is right than another, and the standard error of this.

    Each seed's networks are compared on the same images. Where the images are the same for all
    seeds, the error adds up, in quadrature, that of the choice of the images and that of the seeds,
    of which a single seed says nothing. Where every seed has a fold of the images to itself, the
    deviation between folds holds both.

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
    each = [own[seed].astype(float) - other[seed] for seed in seeds]
    of_seeds = [gains.mean() for gains in each]
    between = np.std(of_seeds, ddof=1) / math.sqrt(len(seeds)) if seeds[1:] else 0.0
    if folds and seeds[1:]:
        return float(np.mean(of_seeds)), float(between)
    of_images = np.mean(each, axis=0)
    within = of_images.std(ddof=1) / math.sqrt(len(of_images))
    return float(of_images.mean()), math.hypot(within, between)
