"""Differences of rows image by image, by hand and against the textbook's test."""

import math

import numpy as np
import pytest

from experiments.studies.paired import difference


def test_by_hand():
    """Of four images one is gained and none lost: 1/4, with deviation 1/2 over four images."""
    own, other = np.array([1, 1, 0, 1], bool), np.array([1, 0, 0, 1], bool)
    assert difference({0: own}, {0: other}, folds=None) == (0.25, 0.25)
    assert difference({0: other}, {0: own}, folds=None) == (-0.25, 0.25)
    assert difference({0: own}, {1: other}, folds=None) is None


def test_of_one_seed_it_is_mcnemar_s():
    """The standard error of (gained - lost) / n, for many images."""
    rng = np.random.default_rng(0)
    own, other = rng.random((2, 3000)) < 0.8
    gained, lost = (own & ~other).sum(), (other & ~own).sum()
    found, error = difference({3: own}, {3: other}, folds=None)
    assert found == pytest.approx((gained - lost) / 3000)
    expected = math.sqrt(gained + lost - (gained - lost) ** 2 / 3000) / 3000
    assert error == pytest.approx(expected, rel=1e-3)


def test_seeds_and_folds_by_hand():
    own = {0: np.array([1, 1, 1, 1], bool), 1: np.array([1, 1, 0, 0], bool)}
    other = {seed: np.array([1, 0, 0, 0], bool) for seed in (0, 1, 2)}
    # Gains of 3/4 and 1/4: their mean, and the root of their variance 1/8, times 1/2 + 1/4.
    assert difference(own, other, folds=0.25) == pytest.approx((0.5, math.sqrt(3 / 32)))
    # Of a single fold there is that of its images only: three gained of four.
    assert difference({0: own[0]}, other, folds=0.25) == pytest.approx((0.75, 0.25))
    # The images gained 0, 1, 1/2 and 1/2: variance 1/6. The rest is 1/4 for each, in both seeds.
    square = 1 / 6 / 4 + 1 / 16 - (8 / 16) / 3 / 8
    expected = 0.5, math.sqrt(square)
    assert difference(own, other, folds=None) == pytest.approx(expected)


@pytest.mark.parametrize(("of_images", "of_seeds"), [(0.0, 0.0), (0.4, 0.0), (0.4, 0.02)])
def test_the_error_of_several_seeds_is_that_of_repeated_studies(of_images, of_seeds):
    """Studies of 3 seeds on 400 images whose gains depend on image, seed, and chance."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        shared = rng.normal(0, of_images, 400)
        gains = rng.normal(0.1, 0.5, (3, 400)) + shared + rng.normal(0, of_seeds, (3, 1))
        # Numbers in the place of right and wrong: the formula takes them as they are.
        own = {seed: row for seed, row in enumerate(gains)}
        found.append(difference(own, dict.fromkeys(own, np.zeros(400)), folds=None))
    means, errors = np.array(found).T
    # A little too large where the seeds have no effect, since no variance is below 0.
    assert 0.9 < np.sqrt((errors**2).mean()) / means.std() < 1.2
