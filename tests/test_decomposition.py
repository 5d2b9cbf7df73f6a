"""Factors of kernels against NumPy and the closed form of the error."""

import numpy as np
import pytest

from chansel_jax.decomposition import component_energies, factorize_kernel


def composed(pointwise, depthwise):
    *_, rank, out_channels = depthwise.shape
    grouped = pointwise.reshape(-1, out_channels, rank)
    return np.einsum("ior,...ro->...io", grouped, depthwise)


KERNEL = np.random.default_rng(2).standard_normal((3, 2, 5, 4))
IN_OTHER_DIMENSIONS = KERNEL.reshape(6, 5, 4), KERNEL.reshape(3, 1, 2, 5, 4)


def test_a_product_by_hand():
    kernel = np.einsum("i,hw->hwi", [3.0, 4.0], [[0.0, 1.0]])[..., None]
    assert component_energies(kernel) == pytest.approx([1, 0])
    pointwise, depthwise = factorize_kernel(kernel, 1)
    sign = np.sign(pointwise[0, 0])
    np.testing.assert_allclose(sign * pointwise, np.sqrt(5) * np.array([[0.6], [0.8]]))
    np.testing.assert_allclose(sign * depthwise[..., 0, 0], [[0, np.sqrt(5)]], atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
def test_error_is_the_energy_left_out(rank):
    approximation = composed(*factorize_kernel(KERNEL, rank))
    left_out = component_energies(KERNEL)[rank:].sum() * (KERNEL**2).sum()
    assert ((KERNEL - approximation) ** 2).sum() == pytest.approx(left_out, rel=1e-9, abs=1e-20)


def test_no_other_product_is_closer():
    """Alternating least squares from elsewhere ends no nearer."""
    pointwise, depthwise = factorize_kernel(KERNEL, 1)
    best = ((KERNEL - composed(pointwise, depthwise)) ** 2).sum()
    rng = np.random.default_rng(3)
    for _ in range(20):
        other = rng.standard_normal((5, 4))
        for _ in range(300):
            window = np.einsum("hwio,io->hwo", KERNEL, other) / (other**2).sum(axis=0)
            other = np.einsum("hwio,hwo->io", KERNEL, window) / (window**2).sum(axis=(0, 1))
        distance = ((KERNEL - np.einsum("io,hwo->hwio", other, window)) ** 2).sum()
        assert distance > best * (1 - 1e-9)


@pytest.mark.parametrize("kernel", IN_OTHER_DIMENSIONS, ids=["1", "3"])
def test_elements_in_other_dimensions_are_the_same_elements(kernel):
    np.testing.assert_array_equal(component_energies(kernel), component_energies(KERNEL))
    for part, same in zip(factorize_kernel(kernel, 2), factorize_kernel(KERNEL, 2), strict=True):
        np.testing.assert_array_equal(part, same.reshape(part.shape))


@pytest.mark.parametrize("rank", [0, 6, 1.5, True, "a"])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"rank={rank!r} must be from 1 to .* = 5"):
        factorize_kernel(KERNEL, rank)


def test_energies_of_zeros_are_in_the_first():
    assert component_energies(np.zeros((3, 3, 2, 1))).tolist() == [1, 0]
