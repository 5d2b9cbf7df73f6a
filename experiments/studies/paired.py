"""Differences between rows of a study whose networks were measured on the same images."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.studies.runs import image_labels
from experiments.studies.study import Study
from experiments.studies.sweep import Outcome, best_rates, network_of, of_seed
from experiments.training.settings import Settings

Right = Mapping[int, np.ndarray]


def compared(
    outcomes: Sequence[Outcome], study: Study, entries: Mapping[str, Settings]
) -> dict[str, str]:
    """How rows of a study differ from their references, which are at their best learning rates.

    Returns:
        `points ± standard error than REFERENCE`, by label, of those that can be compared.
    """
    tuned = best_rates(outcomes, study.tuned_by) if study.tuned_by else outcomes
    references = {network_of(row.label): row for row in tuned}

    def right(row: Outcome) -> dict[int, np.ndarray]:
        found = {}
        for record in row.runs:
            seed = record.settings["seed"]
            predictions = record.evaluations["validation"].get("predictions")
            if predictions:  # records that are older than they have none
                data = of_seed(entries[row.label], seed, study.folds).data
                found[seed] = np.asarray(predictions) == image_labels(data, "validation")
        return found

    found = {}
    for row in outcomes:
        wanted = study.references.get(network_of(row.label), study.reference)
        other = references.get(wanted)
        if other is None or other is row:
            continue
        measured = difference(right(row), right(other), folds=_images_tested(row, study))
        if measured:
            points, error = (100 * share for share in measured)
            found[row.label] = f"{points:+.2f} ± {error:.2f} than {other.label}"
    return found


def _images_tested(row: Outcome, study: Study) -> float | None:
    """For each image that trained a network, where every seed has a fold of its own."""
    images = row.runs[0].data["images"]
    return images["validation"] / images["train"] if study.folds else None


def difference(own: Right, other: Right, *, folds: float | None) -> tuple[float, float] | None:
    """How much more often one row is right than another, and the standard error of this.

    Each seed's networks are compared on the same images. Where the images are the same for all
    seeds, the error holds the choice of the images and that of the seeds, of which a single seed
    says nothing: its square is the variance of the images' means over their number, and that of the
    seeds' means over theirs, less what is left besides the two, which both of them hold. Where
    every seed has a fold of the images to itself, its square is the variance between the folds,
    times the share `1 / count` of a fold and `folds`, for the networks of two folds have most of
    their training images in common (Nadeau and Bengio, "Inference for the Generalization Error",
    2003).

    Args:
        own: by seed, which images `(N,)` bool the row's network is right about.
        other: likewise, of the row that it is compared with.
        folds: how many images each network was measured on for each that trained it, if each seed
            has images of its own; None if all have the same.

    Returns:
        Both as shares of the images; None where the rows have no seed in common.
    """
    seeds = sorted(own.keys() & other.keys())
    if not seeds:
        return None
    if folds and seeds[1:]:
        means = [np.mean(own[seed].astype(float) - other[seed]) for seed in seeds]
        square = np.var(means, ddof=1) * (1 / len(seeds) + folds)
        return float(np.mean(means)), math.sqrt(square)
    gains = np.array([own[seed].astype(float) - other[seed] for seed in seeds])
    count, images = gains.shape
    of_images, of_seeds = gains.mean(axis=0), gains.mean(axis=1)
    square = of_images.var(ddof=1) / images
    if seeds[1:]:
        rest = gains - of_images - of_seeds[:, None] + gains.mean()
        both = (rest**2).sum() / ((images - 1) * (count - 1)) / (images * count)
        square += max(0.0, of_seeds.var(ddof=1) / count - both)
    return float(gains.mean()), math.sqrt(square)
