"""Scores worked out by hand."""

import math

import numpy as np
import pytest
import torch

from chansel_jax.training.prediction import scores


def test_scores_by_hand():
    probabilities = np.array(
        [[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.6, 0.4, 0.0], [0.25, 0.5, 0.25]], np.float32
    )
    found = scores(probabilities, np.array([0, 1, 1, 0]))
    assert found.accuracy == 0.5 and found.top5_accuracy == 1
    assert found.loss == pytest.approx(-math.log(0.5 * 0.8 * 0.4 * 0.25) / 4, rel=1e-6)
    assert found.confusion.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    np.testing.assert_array_equal(found.precision, [0.5, 0.5, np.nan])
    np.testing.assert_array_equal(found.recall, [0.5, 0.5, np.nan])


def test_a_probability_that_underflowed_leaves_the_loss_finite():
    found = scores(np.array([[1.0, 0.0]], np.float32), np.array([1]))
    assert found.loss == pytest.approx(-math.log(np.finfo(np.float32).tiny))


@pytest.mark.parametrize("classes", [5, 6, 20])
def test_accuracy_among_five_is_that_of_pytorch(classes):
    rng = np.random.default_rng(classes)
    probabilities = rng.dirichlet(np.ones(classes), size=50).astype(np.float32)
    labels = rng.integers(classes, size=50)
    _, first = torch.tensor(probabilities).topk(5)
    expected = (first == torch.tensor(labels)[:, None]).any(1).float().mean()
    assert scores(probabilities, labels).top5_accuracy == pytest.approx(float(expected))


def test_five_most_probable_by_hand():
    """Of seven classes; the first of equals is among five, the sixth is not, and no NaN is."""
    sure, unsure = np.eye(1, 7), np.full((1, 7), 1 / 7)
    probabilities = np.concatenate([sure, sure, unsure, unsure, np.full((1, 7), np.nan)])
    found = scores(probabilities.astype(np.float32), np.array([4, 5, 4, 5, 4]))
    assert found.top5_accuracy == 2 / 5
    assert scores(np.full((1, 3), np.nan), np.array([2])).top5_accuracy == 0


@pytest.mark.parametrize(("shape", "count"), [((0, 2), 0), ((3, 2), 2), ((4,), 4)])
def test_shapes_that_do_not_fit(shape, count):
    with pytest.raises(ValueError, match="must be"):
        scores(np.zeros(shape), np.zeros(count, int))
