"""Predictions against the network applied by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chansel_jax import resnet14
from chansel_jax.training.prediction import make_predict, predict_all

MEAN, STD = np.float32([120, 100, 80]), np.float32([60, 50, 40])


@functools.cache
def network():
    network = resnet14(blocks=(1,), width=4, rngs=nnx.Rngs(0))
    network.classifier.bias[...] = jnp.array([0.5, 0.0, -0.5])
    return network


IMAGES = np.random.default_rng(0).integers(256, size=(17, 8, 6, 3), dtype=np.uint8)


def expected(images):
    network().eval()
    return np.asarray(jax.nn.softmax(network()(jnp.asarray((images - MEAN) / STD, jnp.float32))))


@functools.cache
def expected_of_all():
    return expected(IMAGES)


@pytest.mark.parametrize("count", [0, 1, 5, 8, 17])
def test_all_images_in_order_whatever_their_number(count):
    predict = make_predict(network(), MEAN, STD, batch_size=8)
    found = predict_all(predict, IMAGES[:count], 8)
    np.testing.assert_allclose(found, expected_of_all()[:count], rtol=1e-4, atol=1e-6)


def test_flip_average_is_the_mean_of_both():
    predict = make_predict(network(), MEAN, STD, batch_size=8, flip_average=True)
    both = (expected_of_all() + expected(IMAGES[:, :, ::-1])) / 2
    np.testing.assert_allclose(predict(IMAGES[:5]), both[:5], rtol=1e-4, atol=1e-6)


def test_too_many_at_once():
    with pytest.raises(ValueError, match="9 images must be at most batch_size=8"):
        make_predict(network(), MEAN, STD, batch_size=8)(IMAGES[:9])
    with pytest.raises(ValueError, match="batch_size=0 must be an integer of at least 1"):
        predict_all(np.asarray, IMAGES, 0)
