"""Probabilities from a trained network, for images in any number."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chansel_jax.functional import apply_function, network_tree
from chansel_jax.ops.window import positive
from chansel_jax.training.augmentation import normalise

BATCH_SIZE = 250


def make_predict(
    network: nnx.Module,
    mean: np.ndarray,
    std: np.ndarray,
    *,
    batch_size: int = BATCH_SIZE,
    flip_average: bool = False,
) -> Callable[[np.ndarray], np.ndarray]:
    """The function from images `(N, H, W, C)` uint8 to probabilities `(N, classes)` float32.

    It takes at most `batch_size` images at once, and pads fewer, so that it compiles once for
    images of one size. It is computed on the default device.

    Args:
        network: with the parameters to predict with.
        mean: `(C,)`, the channels' means over the training images, in units of the images.
        std: `(C,)`, their standard deviations.
        batch_size: the most images that come at once; the function raises ValueError for more.
        flip_average: whether the probabilities of an image and of its mirror image are averaged.
    """
    apply, tree = apply_function(network, train=False), network_tree(network)
    mean, std = jnp.asarray(mean), jnp.asarray(std)

    @jax.jit
    def probabilities(tree, images):
        def of(images):
            logits, _ = apply(tree["params"], tree["batch_stats"], images, None)
            return jax.nn.softmax(logits)

        images = normalise(images, mean, std)
        return (of(images) + of(images[:, :, ::-1])) / 2 if flip_average else of(images)

    def predict(images: np.ndarray) -> np.ndarray:
        missing = batch_size - len(images)
        if missing < 0:
            raise ValueError(f"{len(images)} images must be at most batch_size={batch_size}")
        padded = np.pad(images, ((0, missing), *[(0, 0)] * 3))
        return np.asarray(probabilities(tree, padded))[: len(images)]

    return predict


def predict_all(
    predict: Callable[[np.ndarray], np.ndarray], images: np.ndarray, batch_size: int = BATCH_SIZE
) -> np.ndarray:
    """Probabilities `(N, classes)` of all `images` `(N, H, W, C)`, batch by batch.

    Raises:
        ValueError: if `batch_size` is not an integer of at least 1, or `predict` takes fewer images
            at once.
    """
    starts = range(0, max(1, len(images)), positive("batch_size", batch_size))
    batches = [images[start : start + batch_size] for start in starts]
    return np.concatenate([predict(batch) for batch in batches])


@dataclasses.dataclass(frozen=True)
class Scores:
    """What `scores` finds for N images of C classes.

    Attributes:
        loss: mean cross-entropy, in nats.
        accuracy: share of the images whose most probable class is theirs.
        top5_accuracy: share of the images whose class is among the five most probable ones; of
            classes that are equally probable the first counts as the more probable, as it does in
            `accuracy`.
        predictions: `(N,)` int64; the most probable class of each image, the first of equals.
        probabilities: `(N,)`; that of each image's own class.
        confusion: `(C, C)` int64; images of class i (row) taken for class j (column).
        precision: `(C,)` float64; of the images taken for a class, the share that are of it; NaN
            where none is.
        recall: `(C,)` float64; of the images of a class, the share taken for it; NaN likewise.
    """

    loss: float
    accuracy: float
    top5_accuracy: float
    predictions: np.ndarray
    probabilities: np.ndarray
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
    own = probabilities[np.arange(count), labels]
    equal_before = (probabilities == own[:, None]) & (np.arange(classes) < labels[:, None])
    more_probable = (~(probabilities <= own[:, None]) | equal_before).sum(axis=1)  # NaN are too
    # The smallest float32, as the probability of what underflowed.
    likelihoods = np.maximum(own, np.finfo(np.float32).tiny)
    with np.errstate(invalid="ignore"):
        precision, recall = correct / confusion.sum(axis=0), correct / confusion.sum(axis=1)
    return Scores(
        loss=float(-np.log(likelihoods.astype(np.float64)).mean()),
        accuracy=float(correct.sum() / count),
        top5_accuracy=float(((more_probable < 5) & (own == own)).mean()),
        predictions=taken_for,
        probabilities=own,
        confusion=confusion,
        precision=precision,
        recall=recall,
    )
