"""Factorising against the dense network it came from, float64 and the closed form of the error."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chansel_jax import factorize as module
from chansel_jax.conv import ChannelSelectionConv, SubKernelConv
from chansel_jax.counting import count_network
from chansel_jax.factorize import component_energies, factorize, factorize_kernel
from chansel_jax.functional import network_tree
from chansel_jax.networks.resnet import ResNet, ResNetConfig


@functools.cache
def dense(stem="plain"):
    """A small dense network with statistics and scales that are not as initialised."""
    config = ResNetConfig(SubKernelConv, 3, (1, 1), 6, stem, use_bias=True, dropout_rate=0.1)
    network = ResNet(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda leaf: leaf + jnp.asarray(rng.uniform(0.1, 0.5, leaf.shape), leaf.dtype),
        network_tree(network),
    )
    nnx.update(network, tree["params"], tree["batch_stats"])
    network.eval()
    return network


@nnx.jit
def forward(network, x):
    return network(x)


def logits(network):
    x = np.random.default_rng(1).standard_normal((2, 12, 10, 3)).astype(np.float32)
    network.eval()
    return np.asarray(forward(network, jnp.asarray(x)))


def parameters(network):
    return sum(leaf.size for leaf in jax.tree.leaves(network_tree(network)["params"]))


def composed(pointwise, depthwise):
    rows, columns, rank, out_channels = depthwise.shape
    grouped = pointwise.reshape(-1, out_channels, rank)
    return np.einsum("ior,hwro->hwio", grouped, depthwise)


KERNEL = np.random.default_rng(2).standard_normal((3, 2, 5, 4))


# Kernels


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


@pytest.mark.parametrize("rank", [0, 6])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=rf"rank={rank} must be from 1 to .* = 5"):
        factorize_kernel(KERNEL, rank)


def test_energies_of_zeros_are_in_the_first():
    assert component_energies(np.zeros((3, 3, 2, 1))).tolist() == [1, 0]


# Networks


@pytest.mark.parametrize("stem", ["plain", "pooled"])
def test_full_rank_computes_the_same(stem):
    network = factorize(dense(stem), rank=9)
    assert isinstance(network.blocks[0].conv1, ChannelSelectionConv)
    assert network.dropout.deterministic and network.blocks[1].norm2.use_running_average
    assert network.config.ranks == ((3,) if stem == "pooled" else ()) + (6, 6, 6, 9)
    np.testing.assert_allclose(logits(network), logits(dense(stem)), rtol=2e-4, atol=2e-4)


def test_lower_ranks_differ_and_the_dense_network_stays():
    before = logits(dense())
    errors = [np.abs(logits(factorize(dense(), rank=rank)) - before).max() for rank in (1, 4)]
    assert errors[0] > errors[1] > 1e-3
    assert np.array_equal(logits(dense()), before)


def test_precision_lowering_dtype_and_mode_stay():
    given = {"precision": "highest", "lowering": "lax", "param_dtype": jnp.bfloat16}
    config = dataclasses.replace(dense().config, conv=functools.partial(SubKernelConv, **given))
    network = ResNet(config, rngs=nnx.Rngs(0))
    network.blocks[0].norm1.eval()
    factored = factorize(network, rank=1)
    first, second = factored.blocks
    assert factored.dropout.deterministic is False
    assert (first.norm1.use_running_average, first.norm2.use_running_average) == (True, False)
    for conv in (first.conv1, second.conv2, second.shortcut):
        assert (conv.precision, conv.lowering) == ("highest", "composed")
        assert conv.param_dtype == conv.pointwise.dtype == jnp.bfloat16


@pytest.mark.parametrize("energy", [0.3, 0.7, 0.95, 1.0])
def test_every_layer_keeps_the_energy_and_not_a_rank_more(energy):
    network = factorize(dense(), energy=energy)
    for rank, (_, layer) in zip(network.config.ranks, module.dense_layers(dense()), strict=True):
        kept = np.cumsum(component_energies(np.asarray(layer.kernel[...])))
        assert kept[rank - 1] >= energy - 1e-9
        assert rank == 1 or kept[rank - 2] < energy


def test_budget_is_kept_and_used():
    least = parameters(factorize(dense(), rank=1))
    most = parameters(factorize(dense(), rank=9))
    sizes = [parameters(factorize(dense(), parameter_budget=b)) for b in (least, 1500, 2500, most)]
    assert sizes[0] == least and sizes[-1] == most
    for budget, size in zip((1500, 2500), sizes[1:3], strict=True):
        # The dearest rank has (12 + 9) · 12 parameters.
        assert budget - 21 * 12 < size <= budget
    with pytest.raises(ValueError, match=f"parameter_budget={least - 1} must be at least"):
        factorize(dense(), parameter_budget=least - 1)


def test_parameters_are_those_of_the_closed_form():
    network = factorize(dense(), energy=0.8)
    rows = count_network(network.config, (12, 10))
    assert sum(row.parameters for row in rows) == parameters(network)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 1, "energy": 0.5}, "exactly one"),
        ({"rank": 0}, "rank=0 must be an integer of at least 1"),
        ({"energy": 0.0}, r"energy=0.0 must be in \(0, 1\]"),
        ({"energy": math.nan}, "energy=nan must be"),
    ],
)
def test_wrong_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        factorize(dense(), **given)


def test_channel_selection_is_refused():
    config = dataclasses.replace(dense().config, conv=ChannelSelectionConv)
    network = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="must be of SubKernelConv"):
        factorize(network, rank=1)
