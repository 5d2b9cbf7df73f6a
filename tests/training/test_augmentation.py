"""Normalisation against NumPy; crops and mirrors found again among all that there can be."""

import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import torch
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from chansel_jax.training import augmentation as functions
from chansel_jax.training.augmentation import (
    Augmentation,
    box_weights,
    normalise,
    random_resized_crop,
    with_reversed,
)

# A program each: one operation after the other, dozens would be compiled.
augmented, mixed = (jax.jit(f, static_argnums=0) for f in (functions.augmented, functions.mixed))
cutout = jax.jit(functions.cutout, static_argnames="size")
random_crop_flip = jax.jit(functions.random_crop_flip, static_argnames=("padding", "flip"))
random_parts = jax.jit(functions.random_parts, static_argnums=2)
resized_parts = jax.jit(functions.resized_parts)

COUNT, PADDING = 1024, 2


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(1, 256, (COUNT, 6, 5, 2), np.uint8)


def variants(images, padding):
    """Every crop of every image, plain and mirrored: `(2p + 1, 2p + 1, 2, N, H, W, C)`."""
    _, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    offsets = range(2 * padding + 1)
    crops = [
        padded[:, top : top + height, left : left + width]
        for top, left in itertools.product(offsets, offsets)
    ]
    both = np.stack([(crop, crop[:, :, ::-1]) for crop in crops])
    return both.reshape(len(offsets), len(offsets), *both.shape[1:])


def found(results, images, padding):
    """`(top, left, mirrored, image)` of every variant that equals the result for its image."""
    return np.argwhere((variants(images, padding) == results).all(axis=(-3, -2, -1)))


# Normalisation


def test_normalise_equals_numpy_in_float64(images):
    mean, std = np.float32([100.5, 31.25]), np.float32([60.1, 0.5])
    result = normalise(jnp.asarray(images), mean, std)
    expected = (images.astype(np.float64) - mean) / std
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-6, atol=1e-6)


# Crops and mirrors


@pytest.mark.parametrize("padding, flip", [(PADDING, True), (PADDING, False), (0, True), (1, True)])
def test_every_result_is_one_crop_of_the_padded_image_mirrored_or_not(images, padding, flip):
    results = random_crop_flip(jax.random.key(1), images, padding=padding, flip=flip)
    matches = found(np.asarray(results), images, padding)
    np.testing.assert_array_equal(np.sort(matches[:, 3]), np.arange(COUNT))
    # All there can be are there, mirrors of every offset among them.
    seen = {tuple(match) for match in matches[:, :3].tolist()}
    offsets = range(2 * padding + 1)
    assert seen == set(itertools.product(offsets, offsets, range(1 + flip)))


def test_half_of_the_images_are_mirrored(images):
    results = random_crop_flip(jax.random.key(2), images, padding=PADDING, flip=True)
    mirrored = found(np.asarray(results), images, PADDING)[:, 2].sum()
    assert abs(mirrored - COUNT / 2) < 5 * np.sqrt(COUNT) / 2  # five standard deviations


def test_offsets_are_uniform(images):
    results = random_crop_flip(jax.random.key(3), images, padding=PADDING, flip=False)
    matches = found(np.asarray(results), images, PADDING)
    share = 1 / (2 * PADDING + 1)
    for axis in (0, 1):
        counts = np.bincount(matches[:, axis])
        assert np.abs(counts - COUNT * share).max() < 5 * np.sqrt(COUNT * share * (1 - share))


def test_without_padding_and_flip_nothing_changes(images):
    result = random_crop_flip(jax.random.key(0), images, padding=0, flip=False)
    np.testing.assert_array_equal(result, images)


@pytest.mark.parametrize("padding, flip", [(PADDING, True), (0, True), (PADDING, False)])
def test_key_decides_the_result(images, padding, flip):
    first, again, other = (
        np.asarray(random_crop_flip(jax.random.key(seed), images, padding=padding, flip=flip))
        for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=(1, 2, 3)).mean() > 0.25


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.float32, jnp.bfloat16])
def test_dtype_and_shape_stay(dtype):
    images = jnp.ones((3, 7, 4, 5), dtype)
    result = random_crop_flip(jax.random.key(0), images, padding=2, flip=True)
    assert (result.dtype, result.shape) == (images.dtype, images.shape)


def test_batch_sharded_over_devices_gives_the_same(images):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))

    @jax.jit
    def augment(key, images):
        images = random_crop_flip(key, images, padding=PADDING, flip=True)
        images = normalise(images, jnp.float32([100, 50]), jnp.float32([60, 30]))
        return cutout(jax.random.fold_in(key, 2), images, size=2)

    key = jax.random.key(4)
    alone = augment(key, jax.device_put(images, jax.devices()[0]))
    sharded = augment(key, jax.device_put(images, sharding))
    assert len(alone.sharding.device_set) == 1
    assert sharded.sharding.is_equivalent_to(sharding, images.ndim)
    np.testing.assert_array_equal(alone, sharded)


# Random resized crops


def parts_by_torchvision_s_rules(trials, places, size):
    """What its documentation describes, one image after the other, in Python's numbers."""
    for own_trials, place in zip(trials.tolist(), places.tolist(), strict=True):
        for of_area, of_ratio in own_trials:
            area = size[0] * size[1] * (0.08 + of_area * 0.92)
            ratio = math.exp(math.log(3 / 4) + of_ratio * (math.log(4 / 3) - math.log(3 / 4)))
            height, width = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
            if 0 < height <= size[0] and 0 < width <= size[1]:
                top = int(place[0] * (size[0] - height + 1))
                yield top, int(place[1] * (size[1] - width + 1)), height, width
                break
        else:
            height, width = size
            if width / height < 3 / 4:
                height = round(width / (3 / 4))
            elif width / height > 4 / 3:
                width = round(height * (4 / 3))
            yield (size[0] - height) // 2, (size[1] - width) // 2, height, width


@pytest.mark.parametrize("size", [(32, 32), (17, 40), (40, 9)])
def test_parts_are_those_of_torchvision_s_rules(size):
    rng = np.random.default_rng(0)
    trials, places = rng.random((400, 2, 2), np.float32), rng.random((400, 2), np.float32)
    starts, sizes = random_parts(trials, places, size)
    expected = np.array(list(parts_by_torchvision_s_rules(trials, places, size)))
    assert len(np.unique(expected[:, 2:], axis=0)) > 20
    actual = np.concatenate([starts, sizes], axis=1)
    # Where a side is a half within float32's rounding, it may be rounded to the other neighbour.
    assert (actual == expected).all(axis=1).mean() > 0.99
    assert (np.abs(actual - expected) <= 1).all(axis=1).mean() > 0.99


def test_a_part_by_hand():
    # The first trial, the whole area at a ratio of 3/4, does not fit; the second is 8 % of it.
    trials, places = np.float32([[[0.999, 0], [0, 0]]]), np.float32([[0, 0.999]])
    starts, sizes = random_parts(trials, places, (30, 40))
    assert (sizes[0].tolist(), starts[0].tolist()) == ([11, 8], [0, 32])
    # None fits: of an image four times as wide as it is high, the middle.
    starts, sizes = random_parts(trials[:, :1], places, (30, 120))
    assert (sizes[0].tolist(), starts[0].tolist()) == ([30, 40], [0, 40])


def test_parts_are_resized_as_pytorch_does():
    images = np.random.default_rng(0).integers(0, 256, (4, 9, 7, 2), np.uint8)
    starts = np.int32([[0, 0], [2, 3], [8, 0], [1, 1]])
    sizes = np.int32([[9, 7], [5, 2], [1, 7], [8, 6]])
    results = resized_parts(images, starts, sizes)
    assert results.dtype == jnp.float32
    for image, result, (top, left), (height, width) in zip(
        images, results, starts, sizes, strict=True
    ):
        part = torch.tensor(image[top : top + height, left : left + width], dtype=torch.float64)
        expected = torch.nn.functional.interpolate(
            part.permute(2, 0, 1)[None], (9, 7), mode="bilinear", antialias=True
        )
        expected = expected[0].permute(1, 2, 0).numpy()
        np.testing.assert_allclose(result, expected, rtol=0, atol=2e-3)


def test_resized_crops_of_a_key():
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    crop = jax.jit(random_resized_crop)
    first, again, other = (np.asarray(crop(jax.random.key(k), images)) for k in (0, 0, 1))
    assert first.shape == images.shape and first.dtype == np.float32
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(axis=(1, 2, 3)).all()
    # The training takes it in the place of the padded crop, and normalises what comes out.
    augmentation = Augmentation(resized_crop=True, flip=False)
    statistics = jnp.full(3, 100.0), jnp.full(3, 50.0)
    varied = augmented(augmentation, jax.random.key(0), images, *statistics)
    key = jax.random.fold_in(jax.random.key(0), 3)
    np.testing.assert_allclose(varied, (crop(key, images) - 100) / 50, rtol=0, atol=1e-4)


# Cutout


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_cutout_sets_one_square_to_zero(images, size):
    results = np.asarray(cutout(jax.random.key(4), images, size=size))
    assert results.dtype == images.dtype
    kept = (results == images).all(axis=-1)
    np.testing.assert_array_equal(results[~kept], 0)  # the images have no zeros of their own
    _, height, width, _ = images.shape
    centres = set()
    for cut in ~kept:
        rows, columns = np.flatnonzero(cut.any(axis=1)), np.flatnonzero(cut.any(axis=0))
        np.testing.assert_array_equal(cut, np.outer(cut.any(axis=1), cut.any(axis=0)))
        for seen, pixels in ((rows, height), (columns, width)):
            first, last = seen[0], seen[-1]
            assert len(seen) == last - first + 1 <= size
            # Less than the whole square is seen at the border only.
            assert len(seen) == size or first == 0 or last == pixels - 1
        centres.add((rows[0], rows[-1], columns[0], columns[-1]))
    if size <= 3:
        assert len(centres) == height * width  # every pixel was a centre


def test_no_cutout_and_equal_keys(images):
    np.testing.assert_array_equal(cutout(jax.random.key(0), images, size=0), images)
    first, again, other = (cutout(jax.random.key(k), images, size=3) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


# Mixing


def timm_box(share, centre, size):
    """Rows and columns of CutMix's box, in Python's own numbers, as timm's `rand_bbox` has them."""
    bounds = []
    for pixels, middle in zip(size, centre, strict=True):
        half = int(pixels * math.sqrt(1 - share)) // 2
        bounds.append((min(max(middle - half, 0), pixels), min(max(middle + half, 0), pixels)))
    return bounds


@pytest.mark.parametrize("size", [(6, 5), (8, 8)])
def test_boxes_are_those_of_timm_s_rules(size):
    rng = np.random.default_rng(0)
    weights = jax.jit(box_weights, static_argnums=2)
    for share in rng.uniform(size=50).astype(np.float32):
        centre = rng.integers(0, size).astype(np.int32)
        expected = np.ones((1, *size, 1), np.float32)
        (top, bottom), (left, right) = timm_box(float(share), centre.tolist(), size)
        expected[0, top:bottom, left:right] = 0
        np.testing.assert_array_equal(weights(share, centre, size), expected)


def test_a_box_by_hand():
    """Half of 8 × 8: a side of int(5.66) = 5 pixels, so two on either side of the corner."""
    found = box_weights(jnp.float32(0.5), jnp.array([0, 7], jnp.int32), (8, 8))[0, ..., 0]
    expected = np.ones((8, 8))
    expected[:2, 5:] = 0
    np.testing.assert_array_equal(found, expected)


def test_a_mixed_batch_by_hand():
    found = with_reversed(jnp.array([[0.0], [10.0], [100.0]]), jnp.float32(0.75))
    np.testing.assert_allclose(found, [[25], [10], [75]])


@pytest.mark.parametrize(
    ("settings", "kinds"),
    [({"mixup": 0.4}, {True}), ({"cutmix": 1.0}, {False}), ({"mixup": 0.4, "cutmix": 1.0}, None)],
)
def test_each_batch_is_mixed_in_one_way_and_by_its_share(settings, kinds):
    """Of images of ones and of twos every pixel shows how much of it is its own."""
    images = jnp.stack([jnp.ones((6, 5, 2)), jnp.full((6, 5, 2), 2.0)])
    keys = jax.random.split(jax.random.key(0), 400)
    mix = functools.partial(mixed, Augmentation(**settings))
    found, shares = jax.jit(jax.vmap(mix, (0, None)))(keys, images)
    own = 2 - np.asarray(found)[:, 0]
    np.testing.assert_allclose(own.mean((1, 2, 3)), shares, atol=1e-5)
    np.testing.assert_allclose(np.asarray(found).sum(1), 3, atol=1e-5)
    np.testing.assert_allclose(own[..., 0], own[..., 1])
    even = np.ptp(own, axis=(1, 2, 3)) < 1e-5
    cut = np.isin(own, (0, 1)).all((1, 2, 3))
    assert (even | cut).all()
    if kinds is None:
        assert 0.35 < (even & ~cut).mean() < 0.65
    elif True in kinds:
        # Kolmogorov and Smirnov's distance to the distribution beta(0.4, 0.4), at 1 %.
        expected = scipy.special.betainc(0.4, 0.4, np.sort(shares))
        assert even.all() and abs(expected - np.arange(400) / 400).max() < 1.63 / math.sqrt(400)
    else:
        assert cut.all() and not even.all()


def test_equal_keys_mix_equally_and_nothing_is_mixed_by_default():
    images = jax.device_put(np.random.default_rng(0).normal(size=(4, 6, 5, 2)).astype(jnp.float32))
    both = Augmentation(mixup=0.5, cutmix=0.5)
    first, again, other = (mixed(both, jax.random.key(i), images)[0] for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert both.mixes and not Augmentation().mixes


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("value", [-1.0, 1e-46, 1e39, math.inf, math.nan])
def test_wrong_parameters_of_mixing(name, value):
    with pytest.raises(
        ValueError, match=f"{name}={re.escape(str(value))} must be 0, or from 1e-30"
    ):
        Augmentation(**{name: value})
