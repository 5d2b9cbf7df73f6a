"""Random crops, flip, cutout, mixing and normalisation, as pure functions on the device."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

# Of `random_resized_crop`: shares of an image, and ratios of width to height.
AREAS = (0.08, 1.0)
RATIOS = (3 / 4, 4 / 3)


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


def random_resized_crop(key: jax.Array, images: jax.Array) -> jax.Array:
    """A random part of every image, scaled to the image's own size.

    As in Szegedy et al., "Going Deeper with Convolutions" (2015), the part is 8 to 100 % of the
    image, and 3/4 to 4/3 as wide as it is high.

    Args:
        key: decides the parts; equal keys give equal results.
        images: `(N, H, W, C)`, any dtype.

    Returns:
        Images of the shape of `images`, float32.
    """
    trials_key, place_key = jax.random.split(key)
    trials = jax.random.uniform(trials_key, (len(images), 10, 2), jnp.float32)
    places = jax.random.uniform(place_key, (len(images), 2), jnp.float32)
    return resized_parts(images, *random_parts(trials, places, images.shape[1:3]))


def random_parts(
    trials: jax.Array, places: jax.Array, size: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """The first row and column, and the rows and columns, of a random part of each image.

    Area and ratio of width to height (its logarithm) are uniform. Of several trials the first whose
    part fits into the image is taken; where none does, the largest in the middle of the image whose
    ratio is within the limits.

    Args:
        trials: `(N, T, 2)`, uniform in [0, 1): they decide area and ratio in each of T trials.
        places: `(N, 2)`, uniform in [0, 1): they decide the first row and column.
        size: H and W of the images.

    Returns:
        Two arrays `(N, 2)` int32: where the parts begin, and how large they are.
    """
    whole = jnp.array(size, jnp.int32)
    area = size[0] * size[1] * (AREAS[0] + trials[..., 0] * (AREAS[1] - AREAS[0]))
    low, high = (math.log(ratio) for ratio in RATIOS)
    ratio = jnp.exp(low + trials[..., 1] * (high - low))
    sides = jnp.round(jnp.sqrt(jnp.stack([area / ratio, area * ratio], axis=-1))).astype(jnp.int32)
    fits = jnp.all((sides >= 1) & (sides <= whole[None, None]), axis=-1)
    first = jnp.argmax(fits, axis=1)[:, None, None]
    chosen = jnp.take_along_axis(sides, first, axis=1)[:, 0]
    starts = jnp.floor(places * (whole[None] - chosen + 1)).astype(jnp.int32)
    starts = jnp.minimum(starts, whole[None] - chosen)  # float32 may round up to the next one
    some = jnp.any(fits, axis=1)[:, None]
    height, width = size
    largest = min(height, round(width / RATIOS[0])), min(width, round(height * RATIOS[1]))
    largest = jnp.array(largest, jnp.int32)
    middle = (whole - largest) // 2
    return jnp.where(some, starts, middle[None]), jnp.where(some, chosen, largest[None])


def resized_parts(images: jax.Array, starts: jax.Array, sizes: jax.Array) -> jax.Array:
    """A part of every image, scaled linearly, with antialiasing, to the image's own size.

    Args:
        images: `(N, H, W, C)`, any dtype.
        starts: first row and column of each part, `(N, 2)`.
        sizes: rows and columns of each part, `(N, 2)`.

    Returns:
        Images of the shape of `images`, float32.
    """

    def weights(axis):
        pixels = images.shape[1 + axis]
        start, size = starts[:, axis, None, None], sizes[:, axis, None, None]
        scale = size / pixels
        places = jnp.arange(pixels, dtype=jnp.float32)
        centres = (places[None, :, None] + 0.5) * scale - 0.5  # of each output, within the part
        inside = places[None, None] - start
        triangle = 1 - jnp.abs(inside - centres) / jnp.maximum(scale, 1)
        triangle = jnp.where((inside >= 0) & (inside < size), jnp.maximum(triangle, 0), 0)
        return triangle / jnp.sum(triangle, axis=-1, keepdims=True)

    rows, columns = weights(0), weights(1)
    images = jnp.einsum("nyh,nhwc->nywc", rows, images.astype(jnp.float32))
    return jnp.einsum("nxw,nywc->nyxc", columns, images)


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
    resized_crop: bool = False
    """A random part of each image, of 8 to 100 % of it, is scaled to the whole image's size, as is
    usual for photographs, and nothing is padded."""
    mixup: float = 0.0
    """Every image is mixed with another of the batch, and its target likewise; the shares are drawn
    from the beta distribution of which this is both parameters. 0 mixes nothing."""
    cutmix: float = 0.0
    """Every image has a box of another of the batch in it, and its target a share of the other's;
    the share is drawn likewise. With --mixup too, each batch has one of them at random. 0 puts in
    nothing."""

    def __post_init__(self):
        for name in ("crop_padding", "cutout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not (value == 0 or 1e-30 <= value <= 1e30):  # beyond, float32 draws no numbers
                raise ValueError(f"{name}={value} must be 0, or from 1e-30 to 1e30")

    @property
    def mixes(self) -> bool:
        """Whether images are made of two."""
        return bool(self.mixup or self.cutmix)


def augmented(
    augmentation: Augmentation,
    key: jax.Array,
    images: jax.Array,
    mean: jax.Array,
    std: jax.Array,
) -> jax.Array:
    """Images `(N, H, W, C)` uint8, varied as `augmentation` says, normalised, in float32.

    Args:
        augmentation: how they are varied.
        key: decides it; equal keys give equal results.
        images: the images.
        mean: as of `normalise`.
        std: likewise.
    """
    padding = augmentation.crop_padding
    if augmentation.resized_crop:
        images, padding = random_resized_crop(jax.random.fold_in(key, 3), images), 0
    images = random_crop_flip(key, images, padding=padding, flip=augmentation.flip)
    images = normalise(images, mean, std)
    # `split` in `random_crop_flip` has made the keys 0 and 1 of this one.
    return cutout(jax.random.fold_in(key, 2), images, size=augmentation.cutout)


def with_reversed(images: jax.Array, weights: jax.Array) -> jax.Array:
    """Every image of a batch, mixed with the one that has its place in the reversed batch.

    Args:
        images: `(N, ...)`, floats; or the targets, likewise.
        weights: what each value of an image counts, a scalar or of as many axes as `images`; its
            partner's counts the rest.
    """
    return weights * images + (1 - weights) * images[::-1]


def box_weights(share: jax.Array, centre: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Weights `(1, H, W, 1)` float32 of an image: 0 within a box of its own proportions, 1 outside.

    As in Yun et al., "CutMix" (2019), and timm. The box has `1 - share` of the image's area, its
    sides rounded down to even numbers of pixels; at the border only a part of it is within.

    Args:
        share: of the image that stays, float32.
        centre: row and column `(2,)` of the box's centre, int32.
        size: H and W.
    """

    def inside(axis):
        half = jnp.floor(size[axis] * jnp.sqrt(1 - share)).astype(jnp.int32) // 2
        places = jnp.arange(size[axis], dtype=jnp.int32)
        return (places >= centre[axis] - half) & (places < centre[axis] + half)

    box = inside(0)[:, None] & inside(1)[None]
    return 1 - box[None, ..., None].astype(jnp.float32)


def mixed(
    augmentation: Augmentation, key: jax.Array, images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Images mixed as `mixup` and `cutmix` say, of which at least one is not 0.

    Mixup is that of Zhang et al., "mixup: Beyond Empirical Risk Minimization" (2018). As in timm
    the whole batch has one share and one box, and each image has its partner in the reversed batch.

    Args:
        augmentation: how they are mixed.
        key: decides it; equal keys give equal results.
        images: `(N, H, W, C)` float32, normalised.

    Returns:
        Images of the shape of `images`, and the share of each that is its own, float32; its
        partner's is the rest.
    """
    size = images.shape[1:3]
    choice_key, share_key, *centre_keys = jax.random.split(key, 4)
    is_mixup = jnp.bool_(not augmentation.cutmix)
    if augmentation.mixup and augmentation.cutmix:
        is_mixup = jax.random.bernoulli(choice_key, jnp.float32(0.5))
    # One draw for either: it takes XLA longer to compile than all other augmentation.
    alpha = jnp.where(is_mixup, jnp.float32(augmentation.mixup), jnp.float32(augmentation.cutmix))
    share = _beta(share_key, alpha)
    pairs = zip(centre_keys, size, strict=True)
    centre = jnp.stack([jax.random.randint(each, (), 0, n, jnp.int32) for each, n in pairs])
    weights = jnp.where(is_mixup, share, box_weights(share, centre, size))
    return with_reversed(images, weights), jnp.mean(weights)


def _beta(key: jax.Array, alpha: jax.Array) -> jax.Array:
    """A share whose distribution is Beta(alpha, alpha): that of one of two equal gammas."""
    logs = jax.random.loggamma(key, alpha, (2,), jnp.float32)
    return jax.nn.sigmoid(logs[0] - logs[1])
