"""Which images and kernels are drawn, read back from the pictures."""

import numpy as np
import pytest
from flax import nnx

from chansel_jax import ChannelSelectionConv, SubKernelConv
from chansel_jax.training.prediction import scores
from experiments.reporting.network_pictures import MOST_KERNELS, MOST_MISTAKES, kernels, mistakes

NAMES = ("cat", "dog")


def of(own):
    """Scores of images of class 1, whose own class has these probabilities."""
    own = np.asarray(own)
    return scores(np.stack([1 - own, own], axis=1), np.ones(len(own), int))


def test_the_worst_mistake_is_the_first():
    images = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    picture = mistakes(images, np.ones(4, int), of([0.4, 0.1, 0.9, 0.3]), NAMES)
    shown = [axes for axes in picture.axes if axes.images]
    assert [int(axes.images[0].get_array()[0, 0, 0]) for axes in shown] == [1, 3, 0]
    assert shown[0].get_title() == "dog: 10.0%\ntaken for cat"


@pytest.mark.parametrize(("count", "rows"), [(9, 2), (MOST_MISTAKES + 5, 3)])
def test_no_more_mistakes_than_there_is_room_for(count, rows):
    images = np.zeros((count, 2, 2, 3), np.uint8)
    picture = mistakes(images, np.ones(count, int), of(np.linspace(0, 0.4, count)), NAMES)
    shown = [axes for axes in picture.axes if axes.images]
    assert len(shown) == min(count, MOST_MISTAKES) and len(picture.axes) == 8 * rows


def test_without_mistakes_and_without_kernels_there_is_no_picture():
    images = np.zeros((2, 2, 2, 3), np.uint8)
    assert mistakes(images, np.ones(2, int), of([0.6, 0.9]), NAMES) is None
    dense = SubKernelConv(2, 2, (3, 3), rngs=nnx.Rngs(0))
    shortcut = ChannelSelectionConv(2, 2, (1, 1), rngs=nnx.Rngs(0))
    assert kernels(nnx.Sequential(dense, shortcut)) is None


def test_kernels_stand_side_by_side_each_over_its_largest():
    layer = ChannelSelectionConv(2, 40, (3, 2), rank=2, rngs=nnx.Rngs(0))
    picture = kernels(nnx.Sequential(layer, nnx.relu))
    (axes,) = picture.axes
    assert axes.get_ylabel() == "layers.0"
    shown = np.asarray(axes.images[0].get_array().filled(np.nan))
    assert shown.shape == (3, 3 * MOST_KERNELS) and np.isnan(shown[:, 2::3]).all()
    for channel in (0, MOST_KERNELS - 1):
        kernel = np.asarray(layer.depthwise[..., 0, channel])
        expected = kernel / np.abs(kernel).max()
        np.testing.assert_allclose(shown[:, 3 * channel : 3 * channel + 2], expected, rtol=1e-6)
