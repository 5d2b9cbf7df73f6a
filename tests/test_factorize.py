"""Factorising against the dense network it came from, and statistics against PyTorch."""

import dataclasses
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from chansel_jax.conv import (
    ChannelSelectionConv,
    SubKernelConv,
    SubspaceChannelSelectionConv,
)
from chansel_jax.counting import count_network
from chansel_jax.decomposition import component_energies
from chansel_jax.factorize import (
    factorizable,
    factorize,
    factorize_kernel,
    highest_rank,
    merge_subspaces,
    recalibrate,
    take_factors,
)
from chansel_jax.functional import network_tree
from chansel_jax.networks.resnet import ResNet, ResNetConfig
from chansel_jax.surgery import parameter_count
from chansel_jax.torch_weights import to_torch
from experiments.pytorch.networks import torch_twin

he_normal = nnx.initializers.he_normal()


@functools.cache
def dense(stem="plain"):
    """A small dense network with statistics and scales that are not as initialised."""
    config = ResNetConfig(SubKernelConv, 3, (1, 1), 6, stem, use_bias=True, dropout_rate=0.1)
    network = ResNet(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    tree = jax.tree.map(
        lambda leaf: leaf + jax.device_put(rng.uniform(0.1, 0.5, leaf.shape).astype(leaf.dtype)),
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


# Factors for a network that is there


def selecting(rank, **changes):
    """A network of channel selection that differs from `dense()` in nothing else."""
    config = dataclasses.replace(dense().config, conv=ChannelSelectionConv, rank=rank, **changes)
    return ResNet(config, rngs=nnx.Rngs(7))


def test_factors_of_full_rank_compute_what_the_dense_network_does():
    """Its 1 × 1 shortcut among them, which `factorize` leaves."""
    network = selecting((6, 6, 6, 9))
    take_factors(network, dense())
    assert isinstance(network.blocks[1].shortcut, ChannelSelectionConv)
    np.testing.assert_allclose(logits(network), logits(dense()), rtol=2e-5, atol=2e-5)


def test_each_layer_has_the_factors_of_its_kernel_and_a_dense_one_the_kernel():
    network = selecting((1, 2, 0, 3))
    take_factors(network, dense())
    for block, name, rank in ((0, "conv1", 1), (0, "conv2", 2), (1, "conv2", 3)):
        found, kernel = (getattr(each.blocks[block], name) for each in (network, dense()))
        pointwise, depthwise = factorize_kernel(np.asarray(kernel.kernel[...]), rank)
        np.testing.assert_allclose(found.pointwise[...], pointwise, rtol=1e-6)
        np.testing.assert_allclose(found.depthwise[...], depthwise, rtol=1e-6)
        np.testing.assert_array_equal(found.bias[...], kernel.bias[...])
    same = network.blocks[1].conv1, dense().blocks[1].conv1
    np.testing.assert_array_equal(*(layer.kernel[...] for layer in same))
    same = network.blocks[1].norm2, dense().blocks[1].norm2
    np.testing.assert_array_equal(*(layer.var[...] for layer in same))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 8}, "blocks.0.conv1 is of (3, 3, 8, 8) in network and of (3, 3, 6, 6) in dense"),
        (
            {"num_classes": 5},
            "params.classifier.bias is of shape (5,) in network and (3,) in dense",
        ),
        ({"blocks": (1, 2)}, "params.blocks.2 is in network only"),
        ({"use_bias": False}, "params.blocks.0.conv1.bias is in dense only"),
    ],
)
def test_factors_of_a_network_of_another_shape_are_refused(changes, message):
    before = network_tree(network := selecting(1, **changes))
    with pytest.raises(ValueError, match=re.escape(message)):
        take_factors(network, dense())
    jax.tree.map(np.testing.assert_array_equal, before, network_tree(network))


# Subspaces that are merged


class Frozen(nnx.Param):
    """What an optimiser may be told to leave."""


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_merged_subspaces_compute_the_same_with_plain_channel_selection(share):
    conv = functools.partial(SubspaceChannelSelectionConv, share=share, depthwise_init=he_normal)
    config = dataclasses.replace(dense().config, conv=conv, width=8, rank=2)
    network = ResNet(config, rngs=nnx.Rngs(0))
    merged = merge_subspaces(network)
    kinds = {type(layer) for _, layer in nnx.iter_modules(merged)}
    assert ChannelSelectionConv in kinds and SubspaceChannelSelectionConv not in kinds
    np.testing.assert_allclose(logits(merged), logits(network), rtol=2e-5, atol=2e-5)
    again = nnx.eval_shape(lambda: ResNet(merged.config, rngs=nnx.Rngs(0)))
    shapes = (jax.tree.map(jnp.shape, network_tree(each)) for each in (merged, again))
    assert next(shapes) == next(shapes)
    assert merged.blocks[0].norm1 is not network.blocks[0].norm1


def test_merged_layers_keep_groups_windows_and_biases():
    layer = SubspaceChannelSelectionConv(
        *(8, 12, (3, 2)), strides=(2, 1), feature_group_count=2, share=1.0, rngs=nnx.Rngs(0)
    )
    layer.bias[...] = jnp.arange(12.0)
    layer.pointwise = Frozen(layer.pointwise[...], note="kept")
    x = jax.device_put(np.random.default_rng(0).normal(size=(2, 7, 6, 8)).astype(jnp.float32))
    merged = merge_subspaces(layer)
    assert type(merged) is ChannelSelectionConv and merged.pointwise.shape == (4, 12)
    np.testing.assert_allclose(merged(x), layer(x), rtol=1e-5, atol=1e-5)
    assert type(merged.pointwise) is Frozen and merged.pointwise.note == "kept"


def test_what_does_not_merge_is_refused():
    layer = SubspaceChannelSelectionConv(8, 8, (3, 3), norm=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="^layers.1: norm=True: matrices with BatchNorm between"):
        merge_subspaces(nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), layer))
    with pytest.raises(ValueError, match="ResNet has no layer with a subspace"):
        merge_subspaces(dense())


# Networks that have a config


@pytest.mark.parametrize("stem", ["plain", "pooled"])
def test_its_config_builds_the_factored_network_again(stem):
    network = factorize(dense(stem), rank=3)
    # The factors of a 7 × 7 kernel for 3 channels are smaller than it up to rank 2.
    assert network.config.ranks == ((0,) if stem == "pooled" else ()) + (3, 3, 3, 3)
    assert isinstance(network.stem.conv, SubKernelConv)
    assert isinstance(network.blocks[0].conv1, ChannelSelectionConv)
    assert isinstance(network.blocks[1].shortcut, SubKernelConv)
    assert network.dropout.deterministic and network.blocks[1].norm2.use_running_average
    again = nnx.eval_shape(lambda: ResNet(network.config, rngs=nnx.Rngs(0)))
    shapes = (jax.tree.map(jnp.shape, network_tree(each)) for each in (network, again))
    assert next(shapes) == next(shapes)
    rows = count_network(network.config, (12, 10))
    assert sum(row.parameters for row in rows) == parameter_count(network)
    arrays = {name: torch.as_tensor(array) for name, array in to_torch(network).items()}
    torch_twin("chansel", network.config).load_state_dict(arrays)  # strictly, each of its shape
    assert dense(stem).config.ranks == (1,) * len(network.config.ranks)


def test_a_factored_network_is_factorised_further():
    once = factorize(dense(), rank=3, where=lambda path, _: path.endswith("conv1"))
    assert once.config.ranks == (3, 0, 3, 0) and once.config.replaced == "spatial"
    assert factorize(once, rank=2).config.ranks == (3, 2, 3, 2)


def test_precision_lowering_dtype_and_mode_stay():
    given = {"precision": "highest", "lowering": "lax", "param_dtype": jnp.bfloat16}
    config = dataclasses.replace(dense().config, conv=functools.partial(SubKernelConv, **given))
    network = ResNet(config, rngs=nnx.Rngs(0))
    network.blocks[0].norm1.eval()
    factored = factorize(network, rank=1)
    again = nnx.eval_shape(lambda: ResNet(factored.config, rngs=nnx.Rngs(0)))
    first, second = factored.blocks
    assert factored.dropout.deterministic is False
    assert (first.norm1.use_running_average, first.norm2.use_running_average) == (True, False)
    for conv in (first.conv1, second.conv2, again.blocks[0].conv1):
        assert (conv.precision, conv.lowering) == ("highest", "composed")
        assert conv.param_dtype == conv.pointwise.dtype == jnp.bfloat16


# Any network


def conv(*sizes, **given):
    def drawn(key, shape, dtype):
        return jax.device_put(
            np.random.default_rng(sum(shape)).standard_normal(shape).astype(dtype)
        )

    return nnx.Conv(*sizes, kernel_init=drawn, rngs=nnx.Rngs(0), **given)


@functools.cache
def others():
    """Convolutions of 1, 2 and 3 dimensions and of two groups, and what stays."""
    return nnx.Dict(
        line=conv(8, 6, 5),
        plane=conv(12, 10, (3, 3), feature_group_count=2),
        volume=nnx.List([conv(7, 5, (2, 3, 2)), conv(5, 5, (1, 1, 1))]),
        small=conv(2, 3, 2),  # one rank's factors are as large as its kernel
        grey=conv(1, 4, (3, 3)),  # they are larger
        linear=nnx.Linear(3, 3, rngs=nnx.Rngs(0)),
    )


def ranks_of(module):
    layers = {path: getattr(each, "rank", 0) for path, each in nnx.iter_modules(module)}
    return {".".join(map(str, path)): rank for path, rank in layers.items() if rank}


def test_what_would_be_larger_stays_dense():
    # K·I / (K + I) is 40 / 13 for the line, 54 / 15 for a group of the plane, 84 / 19.
    highest = {"line": 3, "plane": 3, "volume.0": 4, "small": 0, "grey": 0}
    assert {p: highest_rank(layer) for p, layer in factorizable(others()).items()} == highest
    kept = {path: rank for path, rank in highest.items() if rank}
    assert ranks_of(factorize(others(), rank=3)) == kept | {"volume.0": 3}
    assert ranks_of(factorize(others(), rank=4)) == {"volume.0": 4}
    same = factorize(others(), rank=5)
    assert ranks_of(same) == {} and parameter_count(same) == parameter_count(others())


@pytest.mark.parametrize("energy", [0.3, 0.6, 0.8, 1.0])
def test_every_layer_keeps_the_energy_and_not_a_rank_more(energy):
    ranks = ranks_of(factorize(others(), energy=energy))
    for path, layer in factorizable(others()).items():
        kept = np.cumsum(component_energies(np.asarray(layer.kernel[...])))
        needed = 1 + int(np.argmax(kept >= energy - 1e-9))
        assert ranks.get(path, 0) == (needed if needed <= highest_rank(layer) else 0)


def test_budget_is_kept_and_used():
    most = parameter_count(others())
    # 6 · (40 - 13), 10 · (54 - 15) and 5 · (84 - 19) parameters are saved at rank 1.
    least = most - 162 - 390 - 325
    sizes = [
        parameter_count(factorize(others(), parameter_budget=budget))
        for budget in (least, least + 77, least + 78, 1000, 1100, most, 10**9)
    ]
    # The cheapest rank is one of the line: 6 · 13 parameters.
    assert sizes[:3] == [least, least, least + 78] and sizes[5:] == [most, most]
    for budget, size in zip((1000, 1100), sizes[3:5], strict=True):
        assert budget - 10 * 15 < size <= budget
    with pytest.raises(ValueError, match=f"parameter_budget={least - 1} must be at least the"):
        factorize(others(), parameter_budget=least - 1)


def test_the_rank_that_gains_the_most_is_taken_first():
    """By hand: diagonal kernels of squared values 5, 3 and 2, and 8, 1 and 1 of 10."""
    layers = nnx.List([conv(3, 1, 9, use_bias=False) for _ in range(2)])
    for layer, energies in zip(layers, ((5, 3, 2), (8, 1, 1)), strict=True):
        layer.kernel[...] = jnp.asarray(np.eye(9, 3)[..., None] * np.sqrt(energies)[:, None])
    # One rank has 12 parameters, the kernel 27: the third step, to dense, costs 3 for 2 of 10.
    expected = {24: (1, 1), 35: (1, 1), 36: (2, 1), 39: (0, 1), 51: (0, 2), 54: (0, 0)}
    for budget, wanted in expected.items():
        ranks = ranks_of(factorize(layers, parameter_budget=budget))
        assert (ranks.get("0", 0), ranks.get("1", 0)) == wanted, budget


def test_higher_ranks_are_nearer_and_the_dense_network_stays():
    before = logits(dense())
    errors = [np.abs(logits(factorize(dense(), rank=rank)) - before).max() for rank in (1, 3, 9)]
    assert errors[0] > errors[1] > 1e-3 and errors[2] == 0
    assert np.array_equal(logits(dense()), before)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one"),
        ({"rank": 1, "energy": 0.5}, "exactly one"),
        ({"rank": 0}, "rank=0 must be an integer of at least 1"),
        ({"energy": 0.0}, r"energy=0.0 must be in \(0, 1\]"),
        ({"energy": math.nan}, "energy=nan must be"),
        ({"energy": "0.9"}, "energy='0.9' must be"),
        ({"parameter_budget": 0.5}, "parameter_budget=0.5 must be an integer"),
        ({"rank": 1, "where": lambda path, layer: False}, "module of type Dict has no convolution"),
        ({"rank": 1, "where": "stem"}, "where='stem' must be a function of a path and a layer"),
    ],
)
def test_wrong_arguments(given, message):
    with pytest.raises(ValueError, match=message):
        factorize(others(), **given)


def test_channel_selection_is_refused():
    config = dataclasses.replace(dense().config, conv=ChannelSelectionConv)
    network = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="module of type ResNet has no convolution to factorise"):
        factorize(network, rank=1)


def test_a_pooled_stem_is_described_too():
    config = ResNetConfig(ChannelSelectionConv, 3, (1,), 8, "pooled", replaced="3x3", rank=(0, 2))
    factored = factorize(ResNet(config, rngs=nnx.Rngs(0)), rank=1)
    again = nnx.eval_shape(lambda: ResNet(factored.config, rngs=nnx.Rngs(0)))
    assert factored.config.ranks == (1, 1, 2) and isinstance(again.stem.conv, ChannelSelectionConv)
    chex.assert_trees_all_equal_shapes(network_tree(again), network_tree(factored))


@pytest.mark.parametrize(
    "kind", [SubspaceChannelSelectionConv, functools.partial(ChannelSelectionConv, norm=True)]
)
def test_no_config_has_the_plain_one_beside_another_channel_selection(kind):
    config = ResNetConfig(kind, 3, (1,), 16, "plain", rank=(0, 1))
    network = ResNet(config, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="module: no config builds plain channel selection beside"):
        factorize(network, rank=1)


# Statistics


class Normalised(nnx.Module):
    """BatchNorm, a scaling and BatchNorm, of which the second sees what the first makes."""

    def __init__(self, momentum=0.9):
        self.first = nnx.BatchNorm(3, momentum=momentum, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.second = nnx.BatchNorm(3, momentum=momentum, rngs=nnx.Rngs(0))
        self.first.scale[...] = jnp.array([1.0, 2.0, 0.5])
        self.second.mean[...] = jnp.full(3, jnp.nan)  # stale, as after a training that diverged

    def __call__(self, x, shift=0.0):
        return self.second(self.dropout(nnx.relu(self.first(x) + shift)))


BATCHES = np.random.default_rng(5).normal(2, 3, (3, 8, 3)).astype(np.float32)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_statistics_are_those_of_pytorch(momentum):
    network = Normalised(momentum)
    network.second.eval()
    found = recalibrate(network, iter(BATCHES))
    first, second = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    first.weight.data = torch.tensor([1.0, 2.0, 0.5])
    twin = torch.nn.Sequential(first, torch.nn.ReLU(), second)
    torch.optim.swa_utils.update_bn([torch.from_numpy(batch) for batch in BATCHES], twin)
    for ours, theirs in ((found.first, first), (found.second, second)):
        np.testing.assert_allclose(ours.mean[...], theirs.running_mean, rtol=1e-5, atol=1e-5)
        # PyTorch's variance divides by n - 1.
        np.testing.assert_allclose(ours.var[...], theirs.running_var * 7 / 8, rtol=1e-5)
        assert ours.momentum == momentum
    assert found.second.use_running_average and not found.first.use_running_average
    assert not found.dropout.deterministic
    assert np.isnan(network.second.mean[...]).all() and (network.first.mean[...] == 0).all()


def test_statistics_by_hand_with_two_arguments():
    """The means of (1, 3) and (5, 5) are 2 and 5, the variances 1 and 0."""
    batches = [(jnp.array([[v] * 3 for v in pair], jnp.float32), 1.0) for pair in ((1, 3), (5, 5))]
    found = recalibrate(Normalised(), batches)
    np.testing.assert_allclose(found.first.mean[...], [3.5] * 3)
    np.testing.assert_allclose(found.first.var[...], [0.5] * 3)


def test_after_one_batch_evaluation_is_what_training_computes_on_it():
    network = factorize(dense(), rank=1)
    x = jax.device_put(np.random.default_rng(1).standard_normal((2, 12, 10, 3)).astype(jnp.float32))
    found = recalibrate(network, [x])
    training = nnx.clone(network)
    training.train()
    training.dropout.deterministic = True
    np.testing.assert_allclose(logits(found), forward(training, x), rtol=1e-3, atol=1e-4)
    assert found.config == network.config


def test_what_is_not_called_in_training_keeps_its_statistics():
    class TwoHeads(nnx.Module):
        def __init__(self):
            self.called, self.other = (nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2))
            self.fixed = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
            for norm in (self.other, self.fixed):
                norm.mean[...] = jnp.full(3, 7.0)

        def __call__(self, x, auxiliary=False):
            x = self.fixed(x, use_running_average=True)
            return self.other(x) if auxiliary else self.called(x)

    x = jax.device_put(np.random.default_rng(0).standard_normal((8, 3)).astype(jnp.float32))
    found = recalibrate(TwoHeads(), [x])
    assert jnp.all(found.other.mean[...] == 7) and jnp.all(found.fixed.mean[...] == 7)
    np.testing.assert_allclose(found.called.mean[...], x.mean(0) - 7, rtol=1e-4)


def test_one_array_is_no_list_of_batches():
    with pytest.raises(ValueError, match=r"one array of shape \(4, 8, 8, 3\): write \[images\]"):
        recalibrate(others(), np.zeros((4, 8, 8, 3)))


def test_without_batches_and_without_batch_norm():
    with pytest.raises(ValueError, match="batches holds no batch"):
        recalibrate(Normalised(), [])
    linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    same = recalibrate(linear, [jnp.ones((1, 3))])
    np.testing.assert_array_equal(same.kernel[...], linear.kernel[...])
