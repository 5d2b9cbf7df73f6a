"""Probabilities from a trained network, for images in any number."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chansel_jax.augmentation import normalise
from chansel_jax.training import apply_function, network_tree

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
        ValueError: if `predict` takes fewer than `batch_size` images at once.
    """
    batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    return np.concatenate([predict(batch) for batch in batches])
