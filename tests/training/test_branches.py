"""Branches against convolutions beside each other, and against gradients by way of their sum."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from chansel_jax import ChannelSelectionConv, SubKernelConv
from chansel_jax.functional import apply_function, network_tree
from chansel_jax.training.branches import apart, branched, together
from chansel_jax.training.optimizer import OptimizerSettings, decayed, make_optimizer


class Network(nnx.Module):
    """A convolution, BatchNorm, and a classifier."""

    def __init__(self, conv, width, seed=0):
        rngs = nnx.Rngs(seed)
        self.conv = conv(width, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.classifier = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, x, rngs=None):
        return self.classifier(jnp.mean(nnx.relu(self.norm(self.conv(x))), (1, 2)))


def parameters(seed):
    return network_tree(Network(ChannelSelectionConv, 48, seed))["params"]


@pytest.fixture(scope="module")
def params():
    return parameters(0)


def test_sum_by_hand():
    """Two branches of two outputs: the means of 1 · (1, 2) and 10 · (3, 4), and so on."""
    kernels = {
        "branch0": {"pointwise": jnp.array([[1.0, 5.0], [2.0, 6.0]])},
        "branch1": {"pointwise": jnp.array([[3.0, 7.0], [4.0, 8.0]])},
        "branch_scales": {"scale": jnp.array([[1.0, 100.0], [10.0, 1000.0]])},
    }
    found = together({"conv": {"pointwise": kernels, "bias": jnp.ones(2)}})
    np.testing.assert_array_equal(
        found["conv"]["pointwise"], [[31 / 2, 7500 / 2], [42 / 2, 8600 / 2]]
    )
    np.testing.assert_array_equal(found["conv"]["bias"], [1, 1])


@pytest.mark.parametrize("count", [1, 2, 5])
def test_they_begin_as_the_network_does_and_each_with_the_variance_of_so_many(params, count):
    branches = apart(params, count)
    chex.assert_trees_all_close(together(branches), params, atol=1e-5)
    kernel, parts = (tree["conv"]["pointwise"] for tree in (params, branches))
    for i in range(count):
        ratio = jnp.var(parts[f"branch{i}"]["pointwise"]) / jnp.var(kernel)
        assert float(ratio) == pytest.approx(count, rel=0.15)
    assert branches["classifier"].keys() == {"kernel", "bias"}


def test_another_seed_draws_others(params):
    noise = []
    for own in (params, parameters(1)):
        kernel, parts = (tree["conv"]["pointwise"] for tree in (own, apart(own, 2)))
        noise.append(np.ravel(parts["branch0"]["pointwise"] - kernel))
    assert abs(np.corrcoef(*noise)[0, 1]) < 0.1


def test_a_network_computes_what_branches_beside_each_other_do():
    """Every pair of a pointwise and a depthwise branch is a convolution of its own."""
    layer = ChannelSelectionConv(5, 7, (3, 3), strides=2, use_bias=False, rngs=nnx.Rngs(0))
    branches = jax.device_get(apart(network_tree(layer)["params"], 3))
    rng = np.random.default_rng(0)
    for part in branches.values():
        scale = part["branch_scales"]["scale"]
        part["branch_scales"]["scale"] = rng.normal(size=scale.shape).astype(scale.dtype)
    x = jnp.asarray(rng.normal(size=(2, 9, 8, 5)), jnp.float32)
    sums = 0.0
    for i in range(3):
        for j in range(3):
            pointwise, depthwise = branches["pointwise"], branches["depthwise"]
            scales = (part["branch_scales"]["scale"] for part in (pointwise, depthwise))
            of_pair = {
                "pointwise": pointwise[f"branch{i}"]["pointwise"] * next(scales)[i],
                "depthwise": depthwise[f"branch{j}"]["depthwise"] * next(scales)[j],
            }
            nnx.update(layer, jax.tree.map(jnp.asarray, of_pair))
            sums += layer(x) / 9
    nnx.update(layer, together(jax.tree.map(jnp.asarray, branches)))
    np.testing.assert_allclose(layer(x), sums, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "conv"),
    [("sgd", ChannelSelectionConv), ("muon", ChannelSelectionConv), ("adamw", SubKernelConv)],
)
def test_steps_are_those_of_branches_that_are_trained_themselves(optimizer, conv):
    network = Network(conv, 4)
    tree = network_tree(network)
    apply = apply_function(network, train=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 4)), jnp.float32)

    def loss(params):
        logits, _ = apply(params, tree["batch_stats"], x, None)
        return jnp.sum(logits**2)

    settings = OptimizerSettings(optimizer, weight_decay=0.1, clip_norm=1.0)
    schedule = optax.constant_schedule(0.01)
    plain = make_optimizer(settings, schedule)
    ours = make_optimizer(OptimizerSettings(**vars(settings) | {"branches": 3}), schedule)

    @jax.jit
    def both(params, state, branches, own):
        updates, state = ours.update(jax.grad(loss)(params), state, params)
        gradients = jax.grad(lambda branches: loss(together(branches)))(branches)
        of_branches, own = plain.update(gradients, own, branches)
        return (
            *(optax.apply_updates(params, updates), state),
            *(optax.apply_updates(branches, of_branches), own),
        )

    branches = apart(tree["params"], 3)
    carried = tree["params"], ours.init(tree["params"]), branches, plain.init(branches)
    for _ in range(3):
        carried = both(*carried)
        chex.assert_trees_all_close(carried[0], together(carried[2]), rtol=1e-3, atol=1e-4)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), carried[0], tree["params"])
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(("optimizer", "most"), [("adamw", 1.5), ("muon", 2.0)])
def test_a_first_step_moves_kernels_at_least_as_far_as_without_branches(params, optimizer, most):
    """The steps of the scales add to those of the branches."""
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: jnp.float32(rng.normal(size=leaf.shape)), params)
    lengths = []
    for count in (1, 4):
        settings = OptimizerSettings(optimizer, weight_decay=0.0, branches=count)
        transformation = make_optimizer(settings, optax.constant_schedule(1e-3))
        updates, _ = jax.jit(transformation.update)(gradients, transformation.init(params), params)
        lengths.append(jax.tree.map(jnp.linalg.norm, jax.tree.map(jnp.ravel, updates)))
    ratios = jax.tree.map(lambda many, one: float(many / one), *lengths[::-1])
    assert ratios["classifier"]["kernel"] == pytest.approx(1, rel=1e-3)
    of_layer = ratios["conv"]
    assert 0.99 < of_layer["pointwise"] < most
    assert 0.99 < of_layer["depthwise"] < most


def test_each_of_many_branches_has_its_own_scale():
    """The tenth does not come before the second, whichever order a transformation leaves."""
    values = {f"branch{i}": {"pointwise": jnp.full((1, 1), float(i))} for i in range(12)}
    scales = {"branch_scales": {"scale": jnp.zeros((12, 1)).at[2].set(12.0)}}
    branches = {"conv": {"pointwise": values | scales}}
    for function in (together, jax.jit(together)):
        assert float(function(branches)["conv"]["pointwise"][0, 0]) == 2


def test_what_is_frozen_stays():
    params = {"a": {"pointwise": jnp.ones((2, 3))}, "b": {"pointwise": jnp.ones((2, 3))}}
    optimizer = optax.masked(branched(optax.sgd(0.1), 2), {"a": True, "b": False})
    gradients = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    assert float(updates["a"]["pointwise"].max()) < 0
    chex.assert_trees_all_equal(updates["b"], gradients["b"])


def test_scales_decay_like_those_of_norms(params):
    found = decayed(apart(params, 2), ("norms", "depthwise"))["conv"]
    assert found["pointwise"]["branch1"]["pointwise"] is True
    assert found["depthwise"]["branch1"]["depthwise"] is False
    assert found["pointwise"]["branch_scales"]["scale"] is False


def test_in_flax_s_optimiser():
    layer = ChannelSelectionConv(4, 6, (3, 3), rngs=nnx.Rngs(0))
    tree = network_tree(layer)["params"]
    transformation = branched(optax.sgd(0.1), 2)
    optimizer = nnx.Optimizer(layer, transformation, wrt=nnx.Param)
    gradients = jax.tree.map(jnp.ones_like, nnx.state(layer, nnx.Param))
    optimizer.update(layer, gradients)
    expected, _ = transformation.update(
        jax.tree.map(jnp.ones_like, tree), transformation.init(tree), tree
    )
    found = jax.tree.map(jnp.subtract, network_tree(layer)["params"], tree)
    chex.assert_trees_all_close(found, expected, atol=1e-6)


def test_accumulated_and_traced_abstractly(params):
    """As a run's state is compiled for before there are arrays."""
    optimizer = optax.MultiSteps(branched(optax.adam(1e-3), 3), 2).gradient_transformation()
    state = optimizer.init(params)
    shapes = jax.eval_shape(optimizer.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, shapes)
    update = jax.jit(optimizer.update)
    for expected in (True, False):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        still = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(updates)) == 0
        assert still is expected


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"branches": 0}, "branches=0 must be at least 1"),
        ({"branches": 2, "decay_composed": True}, "branches=2 must be 1 with decay_composed=True"),
    ],
)
def test_wrong_value_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**wrong)
