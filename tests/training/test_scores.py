"""Scores worked out by hand."""

import math

import numpy as np
import pytest

from chansel_jax.training.prediction import scores


def test_scores_by_hand():
    probabilities = np.array(
        [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.4, 0.0], [0.25, 0.5, 0.25]], np.float32
    )
    found = scores(probabilities, np.array([0, 1, 1, 0]))
    assert found.accuracy == 0.5
    assert found.loss == pytest.approx(-math.log(0.5 * 0.8 * 0.4 * 0.25) / 4, rel=1e-6)
    assert found.confusion.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    np.testing.assert_array_equal(found.precision, [0.5, 0.5, np.nan])
    np.testing.assert_array_equal(found.recall, [0.5, 0.5, np.nan])


def test_a_probability_that_underflowed_leaves_the_loss_finite():
    found = scores(np.array([[1.0, 0.0]], np.float32), np.array([1]))
    assert found.loss == pytest.approx(-math.log(np.finfo(np.float32).tiny))


@pytest.mark.parametrize(("shape", "count"), [((0, 2), 0), ((3, 2), 2), ((4,), 4)])
def test_shapes_that_do_not_fit(shape, count):
    with pytest.raises(ValueError, match="must be"):
        scores(np.zeros(shape), np.zeros(count, int))
