"""Random crop, flip, cutout and normalisation, as pure functions on the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax


def normalise(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Images `(N, H, W, C)` uint8 as float32 of zero mean and unit deviation in each channel.

    Args:
        images: the images.
        mean: `(C,)`, in units of the images (0 to 255).
        std: `(C,)`, likewise.
    """
    mean, std = (jnp.reshape(statistic, (1, 1, 1, -1)) for statistic in (mean, std))
    return (images.astype(jnp.float32) - mean) / std


def random_crop_flip(key: jax.Array, images: jax.Array, *, padding: int, flip: bool) -> jax.Array:
    """Crops every image at random out of its padded self, and mirrors half of them.

    Args:
        key: decides the crops and the mirrored images; equal keys give equal results.
        images: `(N, H, W, C)`, any dtype.
        padding: pixels of black added on each side before the crop; 0 leaves the images in place.
        flip: whether each image is mirrored left to right with probability one half.

    Returns:
        Images of the shape and dtype of `images`.
    """
    count, height, width, channels = images.shape
    crop_key, flip_key = jax.random.split(key)
    if padding:
        offsets = jax.random.randint(crop_key, (count, 2), 0, 2 * padding + 1, jnp.int32)
        padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
        crop = functools.partial(lax.dynamic_slice, slice_sizes=(height, width, channels))
        images = jax.vmap(lambda image, offset: crop(image, (*offset, jnp.int32(0))))(
            padded, offsets
        )
    if flip:
        mirrored = jax.random.bernoulli(flip_key, jnp.float32(0.5), (count, 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    return images


def cutout(key: jax.Array, images: jax.Array, *, size: int) -> jax.Array:
    """Sets a square of every image, at a random place, to zero: of normalised images, the mean.

    As in DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout"
    (2017), the square's centre is any pixel, so that at the border only a part of it is seen.

    Args:
        key: decides the places; equal keys give equal results.
        images: `(N, H, W, C)`, any dtype.
        size: pixels each way of the square; 0 leaves the images as they are.

    Returns:
        Images of the shape and dtype of `images`.
    """
    if not size:
        return images

    def inside(key, pixels):
        first = jax.random.randint(key, (len(images), 1), 0, pixels, jnp.int32) - size // 2
        places = jnp.arange(pixels, dtype=jnp.int32)[None]
        return (places >= first) & (places < first + size)

    keys = jax.random.split(key)
    rows, columns = map(inside, keys, images.shape[1:3])
    return jnp.where(rows[:, :, None, None] & columns[:, None, :, None], 0, images)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training images are varied."""

    crop_padding: int = 4
    """Before a random crop each side is padded with this many black pixels; 0 crops nothing."""
    flip: bool = True
    """Images are mirrored left to right at random."""
    cutout: int = 0
    """A square of this many pixels each way, at a random place, is set to the mean; 0 cuts
    nothing."""

    def __post_init__(self):
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
