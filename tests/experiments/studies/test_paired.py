"""Differences of rows image by image, by hand and against the textbook's test."""

import math

import numpy as np
import pytest

from experiments.studies.paired import difference


def test_by_hand():
    """Of four images one is gained and none lost: 1/4, with deviation 1/2 over four images."""
    own, other = np.array([1, 1, 0, 1], bool), np.array([1, 0, 0, 1], bool)
    assert difference({0: own}, {0: other}, folds=False) == (0.25, 0.25)
    assert difference({0: other}, {0: own}, folds=False) == (-0.25, 0.25)
    assert difference({0: own}, {1: other}, folds=False) is None


def test_of_one_seed_it_is_mcnemar_s():
    """The standard error of (gained - lost) / n, for many images."""
    rng = np.random.default_rng(0)
    own, other = rng.random((2, 3000)) < 0.8
    gained, lost = (own & ~other).sum(), (other & ~own).sum()
    found, error = difference({3: own}, {3: other}, folds=False)
    assert found == pytest.approx((gained - lost) / 3000)
    expected = math.sqrt(gained + lost - (gained - lost) ** 2 / 3000) / 3000
    assert error == pytest.approx(expected, rel=1e-3)


def test_seeds_add_their_own_error_and_folds_have_all_of_it():
    own = {0: np.array([1, 1, 1, 1], bool), 1: np.array([1, 1, 0, 0], bool)}
    other = {seed: np.array([1, 0, 0, 0], bool) for seed in (0, 1, 2)}
    # Gains of 3/4 and 1/4: their mean, and their deviation over the root of two.
    folds = difference(own, other, folds=True)
    assert folds == pytest.approx((0.5, 0.25))
    # The images gained 0, 1, 1/2 and 1/2 in the mean of the seeds.
    within = np.std([0, 1, 0.5, 0.5], ddof=1) / 2
    assert difference(own, other, folds=False) == pytest.approx((0.5, math.hypot(within, 0.25)))
    assert difference({0: own[0]}, other, folds=True)[1] > 0
