"""How good predictions are: pure functions of arrays."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Scores:
    """What `scores` finds for N images of C classes.

    Attributes:
        loss: mean cross-entropy, in nats.
        accuracy: share of the images whose most probable class is theirs.
        confusion: `(C, C)` int64; images of class i (row) taken for class j (column).
        precision: `(C,)` float64; of the images taken for a class, the share that are of it; NaN
            where none is.
        recall: `(C,)` float64; of the images of a class, the share taken for it; NaN likewise.
    """

    loss: float
    accuracy: float
    confusion: np.ndarray
    precision: np.ndarray
    recall: np.ndarray


def scores(probabilities: np.ndarray, labels: np.ndarray) -> Scores:
    """The scores of `probabilities` `(N, C)` for images of the classes `labels` `(N,)`.

    Raises:
        ValueError: if there is no image, or the shapes do not fit each other.
    """
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise ValueError(
            f"probabilities of shape {probabilities.shape} and labels of shape {labels.shape} must "
            "be (N, C) and (N,), N at least 1"
        )
    count, classes = probabilities.shape
    taken_for = probabilities.argmax(axis=1)
    confusion = np.bincount(labels * classes + taken_for, minlength=classes**2)
    confusion = confusion.reshape(classes, classes)
    correct = confusion.diagonal()
    # The smallest float32, as the probability of what underflowed.
    likelihoods = np.maximum(probabilities[np.arange(count), labels], np.finfo(np.float32).tiny)
    with np.errstate(invalid="ignore"):
        precision, recall = correct / confusion.sum(axis=0), correct / confusion.sum(axis=1)
    return Scores(
        loss=float(-np.log(likelihoods.astype(np.float64)).mean()),
        accuracy=float(correct.sum() / count),
        confusion=confusion,
        precision=precision,
        recall=recall,
    )
