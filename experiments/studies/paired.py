"""Differences between rows of a study whose networks were measured on the same images."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.studies.runs import image_labels
from experiments.studies.study import Study
from experiments.studies.sweep import Outcome, best_rates, network_of, of_seed
from experiments.training.settings import Settings

Right = Mapping[int, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How rows differ from one of them.

    Attributes:
        reference: the label of that row.
        differences: of the others, by label: `points ± standard error`.
    """

    reference: str
    differences: Mapping[str, str]


def compared(
    outcomes: Sequence[Outcome], study: Study, entries: Mapping[str, Settings]
) -> Comparison | None:
    """The rows of a study beside its reference, that one at its best learning rate.

    Returns:
        What was found; None if the reference is not there, or no row can be compared with it.
    """
    tuned = best_rates(outcomes, study.tuned_by) if study.tuned_by else outcomes
    reference = next((row for row in tuned if network_of(row.label) == study.reference), None)
    if reference is None:
        return None

    def right(row: Outcome) -> dict[int, np.ndarray]:
        found = {}
        for record in row.runs:
            seed = record.settings["seed"]
            predictions = record.evaluations["validation"].get("predictions")
            if predictions:  # records that are older than they have none
                data = of_seed(entries[row.label], seed, study.folds).data
                found[seed] = np.asarray(predictions) == image_labels(data, "validation")
        return found

    other, found = right(reference), {}
    for row in outcomes:
        measured = difference(right(row), other, folds=study.folds)
        if measured and row is not reference:
            found[row.label] = "{:+.2f} ± {:.2f}".format(*(100 * share for share in measured))
    return Comparison(reference.label, found) if found else None


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
