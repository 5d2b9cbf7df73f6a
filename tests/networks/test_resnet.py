"""The residual block and the networks: against PyTorch, in both modes, and by their arguments."""

import dataclasses
import functools

import chex
import initial
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from layers import normal, with_random_norms

from chansel_jax import (
    ChannelSelectionConv,
    ResNet,
    ResNetConfig,
    SubKernelConv,
    cifar_resnet,
    make_network,
    resnet14,
    resnet18,
    wide_resnet,
)
from chansel_jax.networks.resnet import CONVS, PRESETS
from chansel_jax.torch_weights import from_torch, to_numpy
from experiments.pytorch.networks import torch_twin

BATCH = 4


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def unset(kind):
    """The convolution, without the time that initialising it takes."""
    return functools.partial(CONVS[kind], kernel_init=nnx.initializers.zeros)


def randomised(twin):
    """`twin` in float64, its BatchNorms with other values than the initial zeros and ones."""
    return with_random_norms(twin.double())


def carried(network, twin):
    """`network` in float64 with the weights and running statistics of `twin`."""
    state = nnx.state(network, (nnx.Param, nnx.BatchStat))
    nnx.update(network, jax.tree.map(lambda leaf: jax.device_put(np.float64(leaf)), state))
    from_torch(network, twin.state_dict())
    return network


def step(network, part, loss, x):
    """Loss, gradient of `x`, and `to_numpy` after a step: gradients in the parameters' places."""
    graphdef, params, rest = nnx.split(part, nnx.Param, ...)

    @jax.jit
    def loss_and_gradients(params, rest, x):
        def loss_of(params, x):
            module = nnx.merge(graphdef, params, rest, copy=True)
            return loss(module(x)), nnx.state(module, nnx.BatchStat)

        return jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(params, x)

    (value, stats), (gradients, x_gradient) = loss_and_gradients(params, rest, x)
    nnx.update(part, gradients, stats)
    return value, x_gradient, to_numpy(network)


def torch_step(twin, part, loss, x):
    """What `step` returns, by PyTorch, with running variances as Flax defines them."""
    before = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    samples = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda module, inputs, name=name: samples.update(
                {f"{name}.running_var": inputs[0].numel() // inputs[0].shape[1]}
            )
        )
        for name, module in twin.named_modules()
        if isinstance(module, torch.nn.BatchNorm2d) and module.training
    ]
    value = loss(part(x))
    value.backward()
    for hook in hooks:
        hook.remove()
    after = {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}
    for name, buffer in twin.named_buffers():
        if name in samples:
            # PyTorch takes the variance of a sample, divided by n - 1; Flax divides by n.
            n, old = samples[name], 0.9 * before[name]
            after[name] = old + (buffer - old) * (n - 1) / n
        elif not name.endswith("num_batches_tracked"):
            after[name] = buffer
    return value.detach().numpy(), x.grad, {name: a.numpy() for name, a in after.items()}


def assert_close(actual, expected, tolerance):
    """Every array of the trees to within `tolerance` of its own largest element."""
    # A bias before BatchNorm has no gradient but rounding, which must not be held against it.
    scale = jax.tree.map(lambda leaf: max(np.abs(leaf).max(), 1e-5), expected)
    trees = (jax.tree.map(np.divide, tree, scale) for tree in (actual, expected))
    chex.assert_trees_all_close(*trees, rtol=0, atol=tolerance)


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("kind", CONVS)
def test_block_is_that_of_torch(x64, kind, strides, train):
    torch.manual_seed(0)
    config = ResNetConfig(unset(kind), 2, (1, 1), 8, "plain", dtype=jnp.float64)
    twin = randomised(torch_twin(kind, config)).train(train)
    network = carried(ResNet(config, rngs=nnx.Rngs(0)), twin)
    network.train() if train else network.eval()
    name = f"layer{strides}.0."  # the second stage's block has stride 2 and the shortcut

    rng = np.random.default_rng(0)
    x, cotangent = rng.standard_normal((BATCH, 8, 6, 8)), rng.standard_normal((BATCH, 8, 6, 8))
    if strides == 2:
        cotangent = rng.standard_normal((BATCH, 4, 3, 16))
    torch_x = nchw(x).requires_grad_()
    torch_block = twin.get_submodule(name.rstrip("."))
    expected = torch_step(twin, torch_block, lambda y: (y * nchw(cotangent)).sum(), torch_x)
    actual = step(
        network, network.blocks[strides - 1], lambda y: (y * cotangent).sum(), jnp.asarray(x)
    )
    in_block = {n: a for n, a in actual[2].items() if n.startswith(name)}
    assert in_block.keys() == {name + n for n in torch_block.state_dict() if "batches" not in n}
    actual = (np.asarray(actual[0]), nchw(np.asarray(actual[1])).numpy(), in_block)
    in_block = {n: a for n, a in expected[2].items() if n.startswith(name)}
    assert_close(actual, (expected[0], expected[1].numpy(), in_block), 1e-10)


@pytest.mark.parametrize(
    ("preset", "kind", "options"),
    [
        ("resnet14", "chansel", {"use_bias": True}),
        ("resnet18", "chansel", {"rank": 2}),
        ("resnet14", "subkernel", {}),
        ("resnet18", "subkernel", {"block": "preactivation"}),
        ("resnet14", "subspace", {"replaced": "3x3", "rank": 2}),
        ("resnet50", "chansel", {"rank": 2}),
        ("cifar_resnet20", "chansel", {"rank": 2}),
        ("cifar_wrn16_2", "subspace", {"stem_width": 4}),
    ],
)
def test_networks_are_those_of_torch(x64, preset, kind, options):
    """With a block that keeps the width and one that doubles it, and what compiles fastest."""
    torch.manual_seed(0)
    conv = functools.partial(unset(kind), lowering="lax" if kind == "subkernel" else "composed")
    shape = {"num_classes": 10, "blocks": (1, 1), "width": 8, "dropout_rate": 0.0, **options}
    config = dataclasses.replace(PRESETS[preset], conv=conv, dtype=jnp.float64, **shape)
    twin = randomised(torch_twin(kind, config))
    network = carried(ResNet(config, rngs=nnx.Rngs(0)), twin)
    rng, size = np.random.default_rng(0), config.image_size // 4
    images = rng.standard_normal((BATCH, size, size, 3))
    labels = rng.integers(10, size=BATCH)

    network.eval()
    logits = jax.jit(lambda state, x: nnx.merge(nnx.graphdef(network), state)(x))(
        nnx.state(network), images
    )
    with torch.no_grad():
        expected = twin.eval()(nchw(images))
    assert logits.dtype == jnp.float32
    # The logits are float32 whatever the computation is, and so are the errors of what depends on
    # them; the rest is float64 on both sides.
    assert_close(np.asarray(logits), expected.numpy(), 1e-6)

    def cross_entropy(logits):
        return -jax.nn.log_softmax(logits)[jnp.arange(BATCH), labels].mean()

    def torch_cross_entropy(logits):
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))

    network.train()
    twin.train()
    expected = torch_step(twin, twin, torch_cross_entropy, nchw(images).requires_grad_())
    actual = step(network, network, cross_entropy, jnp.asarray(images))
    actual = (np.asarray(actual[0]), nchw(np.asarray(actual[1])).numpy(), actual[2])
    assert_close(actual, (expected[0], expected[1].numpy(), expected[2]), 1e-6)


def drawn(key, shape, dtype):
    """An initialiser in NumPy, which compiles nothing."""
    values = np.random.default_rng(0).standard_normal(shape) * np.prod(shape[:-1]) ** -0.5
    return jnp.asarray(values, dtype)


def small(preset=resnet14, conv=ChannelSelectionConv, **options):
    """A network of two blocks and width 4 for the tests of behaviour."""
    conv = functools.partial(conv, kernel_init=drawn)
    return preset(conv, **{"blocks": (1, 1), "width": 4, "rngs": nnx.Rngs(0), **options})


def image_batch(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


@nnx.jit
def forward(network, x):
    return network(x)


def batch_stats(network):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(network, nnx.BatchStat)))


def test_evaluation_mode_is_a_function_of_each_image_alone():
    network, x = small(dropout_rate=0.5), image_batch(4, 8, 8, 3)
    forward(network, x)  # statistics that are not the initial ones
    network.eval()
    before = batch_stats(network)
    logits = forward(network, x)
    chex.assert_shape(logits, (4, 3))
    np.testing.assert_array_equal(forward(network, x), logits)
    np.testing.assert_allclose(forward(network, x[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(batch_stats(network), before)


def test_training_mode_drops_features_and_moves_the_statistics():
    network, x = small(dropout_rate=0.5), image_batch(4, 8, 8, 3)
    network.eval()
    network.train()
    before = batch_stats(network)
    assert (forward(network, x) != forward(network, x)).any()
    moved = jax.tree.map(lambda a, b: (a != b).any(), batch_stats(network), before)
    assert all(jax.tree.leaves(moved))


def test_training_mode_without_dropout_is_deterministic():
    network, x = small(dropout_rate=0.0), image_batch(4, 8, 8, 3)
    np.testing.assert_array_equal(forward(network, x), forward(network, x))


def test_the_dropout_stream_can_be_given():
    network, x = small(dropout_rate=0.5), image_batch(4, 8, 8, 3)

    @nnx.jit
    def logits(network, key):
        return network(x, rngs=nnx.Rngs(dropout=key))

    first, second = jax.random.key(1), jax.random.key(2)
    np.testing.assert_array_equal(logits(network, first), logits(network, first))
    assert (logits(network, first) != logits(network, second)).any()


@pytest.mark.parametrize("preset", [resnet14, resnet18])
@pytest.mark.parametrize("conv", [SubKernelConv, ChannelSelectionConv])
def test_bfloat16_keeps_parameters_and_logits_in_float32(preset, conv):
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.bfloat16)
    network = nnx.eval_shape(lambda: small(preset, conv, dtype=jnp.bfloat16))
    assert nnx.eval_shape(lambda network, x: network(x), network, x).dtype == jnp.float32
    state = nnx.state(network, (nnx.Param, nnx.BatchStat))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    block = nnx.eval_shape(
        lambda block, x: block(x), network.blocks[0], jax.ShapeDtypeStruct((2, 8, 8, 4), x.dtype)
    )
    assert block.dtype == jnp.bfloat16


def test_bfloat16_is_near_float32():
    x = image_batch(4, 8, 8, 3)
    expected = forward(small(dropout_rate=0.0), x)
    actual = forward(small(dropout_rate=0.0, dtype=jnp.bfloat16), x)
    assert 0 < np.linalg.norm(actual - expected) < 0.1 * np.linalg.norm(expected)


def test_width_rank_and_bias_reach_every_convolution():
    network = nnx.eval_shape(
        lambda: small(resnet18, blocks=(2,) * 4, width=6, rank=4, use_bias=True)
    )
    convs = {
        ".".join(map(str, path)): layer
        for path, layer in nnx.iter_modules(network)
        if isinstance(layer, ChannelSelectionConv)
    }
    assert len(convs) == 1 + 8 * 2 + 3
    assert all(layer.bias is not None for layer in convs.values())
    # The stem has three channels to select from, a 1 × 1 kernel one element: their ranks follow.
    ranks = {name: 3 if "stem" in name else 1 if "shortcut" in name else 4 for name in convs}
    assert {name: layer.rank for name, layer in convs.items()} == ranks
    assert [block.conv1.out_features for block in network.blocks] == [6, 6, 12, 12, 24, 24, 48, 48]
    assert [block.conv1.strides[0] for block in network.blocks] == [1, 1, 2, 1, 2, 1, 2, 1]
    assert [block.shortcut is not None for block in network.blocks] == [0, 0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("conv", [SubKernelConv, ChannelSelectionConv])
def test_the_plain_stem_is_an_ordinary_convolution_with_bias(conv):
    network = nnx.eval_shape(lambda: small(conv=conv))
    assert type(network.stem.conv) is SubKernelConv
    assert network.stem.conv.bias is not None
    assert type(network.blocks[0].conv1) is conv
    assert network.blocks[0].conv1.bias is None


def test_a_partial_of_a_convolution_is_a_convolution():
    x = image_batch(2, 8, 8, 3)
    composed = small(dropout_rate=0.0)
    grouped = small(
        conv=functools.partial(ChannelSelectionConv, lowering="grouped"), dropout_rate=0.0
    )
    assert grouped.blocks[0].conv1.lowering == "grouped"
    chex.assert_trees_all_close(forward(grouped, x), forward(composed, x), rtol=1e-4, atol=1e-5)


def test_presets():
    assert PRESETS["resnet14"] == ResNetConfig(
        conv=ChannelSelectionConv,
        num_classes=3,
        blocks=(2, 2, 2),
        width=16,
        stem="plain",
        dropout_rate=0.2,
    )
    assert PRESETS["resnet18"] == ResNetConfig(
        conv=ChannelSelectionConv,
        num_classes=1000,
        blocks=(2, 2, 2, 2),
        width=64,
        stem="pooled",
    )
    cifar = PRESETS["cifar_resnet20"]
    assert cifar == ResNetConfig(
        conv=ChannelSelectionConv,
        num_classes=10,
        blocks=(3, 3, 3),
        width=16,
        stem="small",
        input_norm=True,
        replaced="3x3",
    )
    assert PRESETS["cifar_resnet110"] == dataclasses.replace(cifar, blocks=(18, 18, 18))
    assert PRESETS["cifar_wrn28_10"] == dataclasses.replace(
        cifar, blocks=(4, 4, 4), width=160, stem_width=16, block="preactivation"
    )
    torchvision = PRESETS["resnet18"]
    assert PRESETS["resnet34"] == dataclasses.replace(torchvision, blocks=(3, 4, 6, 3))
    assert PRESETS["resnet50"] == dataclasses.replace(
        torchvision, blocks=(3, 4, 6, 3), block="bottleneck"
    )
    assert (PRESETS["resnet14"].image_size, PRESETS["resnet18"].image_size) == (32, 224)


@pytest.mark.parametrize("build", [resnet14, resnet18])
def test_builders_build_their_preset_with_changes(build):
    preset = PRESETS[build.__name__]
    assert nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))).config == preset
    changed = dataclasses.replace(preset, conv=SubKernelConv, num_classes=10, width=8)
    network = nnx.eval_shape(lambda: build(SubKernelConv, 10, width=8, rngs=nnx.Rngs(0)))
    assert network.config == changed
    with pytest.raises(ValueError, match="width=0"):
        build(width=0, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="depth"):
        build(depth=3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "value", "others"),
    [
        ("num_classes", 0, {}),
        ("width", 0, {}),
        ("width", 16.0, {}),
        ("in_channels", -3, {}),
        ("blocks", (), {}),
        ("blocks", 2, {}),
        ("conv", "chansel", {}),
        ("dtype", "float31", {}),
        ("stem", "deep", {}),
        ("stem_width", 0, {}),
        ("block", "wide", {}),
        ("replaced", "none", {}),
        ("rank", 0, {}),
        ("rank", 10, {}),
        ("rank", 2, {"conv": SubKernelConv}),
        ("rank", 2, {"conv": nnx.Conv}),
        ("dropout_rate", 1.0, {}),
        ("dropout_rate", -0.1, {}),
        ("dropout_rate", float("nan"), {}),
        ("dropout_rate", "a", {}),
    ],
)
def test_wrong_argument(name, value, others):
    config = PRESETS["resnet14"]
    with pytest.raises(ValueError) as error:
        dataclasses.replace(config, **{**others, name: value})
    assert f"{name}={value!r}" in str(error.value)


def test_wrong_number_of_blocks():
    config = PRESETS["resnet14"]
    with pytest.raises(ValueError, match="blocks=0"):
        dataclasses.replace(config, blocks=(2, 0))
    assert dataclasses.replace(config, blocks=[1, 1]) == dataclasses.replace(config, blocks=(1, 1))


def test_forward_mode_derivatives_of_a_network():
    network = small()
    network.eval()
    images = jnp.ones((2, 8, 8, 3))
    logits, tangent = jax.jvp(network, (images,), (images,))
    assert tangent.shape == logits.shape and jnp.abs(tangent).max() > 0


@pytest.mark.parametrize(
    ("build", "conv", "expected"),
    [
        (resnet14, ChannelSelectionConv, -3.4066299),
        (resnet18, ChannelSelectionConv, -21.9318074),
        (resnet14, SubKernelConv, 1.4869897),
        (resnet18, SubKernelConv, -29.3182196),
    ],
)
def test_a_seed_always_gives_the_same_parameters(build, conv, expected, monkeypatch):
    """Runs that were made before can be made again."""
    monkeypatch.setattr(initial.drawing, "truncated_normal", initial.by_jax)
    network = build(conv, blocks=(1, 1), width=4, rngs=nnx.Rngs(0))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(network, nnx.Param)))
    values = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])
    # Compilers round differently, keys do not: a digest that forgives the last bits.
    assert values @ np.cos(np.arange(values.size)) == pytest.approx(expected, abs=1e-4)


def test_a_network_of_flax_s_convolution_is_the_dense_one():
    ours, theirs = (resnet14(conv, rngs=nnx.Rngs(0)) for conv in (SubKernelConv, nnx.Conv))
    parameters = [nnx.to_pure_dict(nnx.state(network, nnx.Param)) for network in (ours, theirs)]
    chex.assert_trees_all_equal(*parameters)
    assert sum(leaf.size for leaf in jax.tree.leaves(parameters[1])) == 174_787
    ours.eval()
    theirs.eval()
    x = image_batch(2, 16, 16, 3)
    chex.assert_trees_all_close(forward(ours, x), forward(theirs, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("preset", "replaced", "expected"),
    [
        ("resnet14", "all", {"blocks.conv", "blocks.shortcut"}),
        ("resnet14", "spatial", {"blocks.conv"}),
        ("resnet14", "3x3", {"stem.conv", "blocks.conv"}),
        ("resnet18", "all", {"stem.conv", "blocks.conv", "blocks.shortcut"}),
        ("resnet18", "spatial", {"stem.conv", "blocks.conv"}),
        ("resnet18", "3x3", {"blocks.conv"}),
        ("cifar_resnet20", "3x3", {"stem.conv", "blocks.conv"}),
    ],
)
def test_which_convolutions_are_replaced(preset, replaced, expected):
    config = dataclasses.replace(PRESETS[preset], blocks=(1, 1), width=4, replaced=replaced)
    network = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    kinds = {
        f"{path[0]}.{str(path[-1]).rstrip('12')}": type(layer)
        for path, layer in nnx.iter_modules(network)
        if isinstance(layer, (ChannelSelectionConv, SubKernelConv))
    }
    assert {name for name, kind in kinds.items() if kind is ChannelSelectionConv} == expected
    assert set(kinds) == {"stem.conv", "blocks.conv", "blocks.shortcut"}


def test_of_a_bottleneck_s_convolutions_the_3_by_3_one_is_replaced():
    config = dataclasses.replace(
        PRESETS["resnet50"], blocks=(1, 1), width=4, replaced="3x3", rank=2
    )
    network = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    first, second = network.blocks
    convs = [first.conv1, first.conv2, first.conv3, first.shortcut]
    assert [type(conv) for conv in convs] == [
        SubKernelConv,
        ChannelSelectionConv,
        SubKernelConv,
        SubKernelConv,
    ]
    assert [conv.in_features for conv in convs] == [4, 4, 4, 4]
    assert second.conv2.strides == (2, 2) and second.conv3.out_features == 32
    assert config.ranks == (2, 2) and second.conv2.rank == 2


def test_networks_by_their_names():
    network = nnx.eval_shape(
        lambda: make_network("cifar_resnet20", SubKernelConv, 7, blocks=(1,), rngs=nnx.Rngs(0))
    )
    changes = {"conv": SubKernelConv, "num_classes": 7, "blocks": (1,)}
    assert network.config == dataclasses.replace(PRESETS["cifar_resnet20"], **changes)
    with pytest.raises(ValueError, match="name='resnet15' must be one of 'resnet14', "):
        make_network("resnet15", rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("config", "arguments", "told"),
    [
        (cifar_resnet, (21,), "depth=21 must be 6n [+] 2"),
        (cifar_resnet, (2,), "depth=2 must be 6n [+] 2"),
        (cifar_resnet, (20.0,), "depth=20.0 must be"),
        (wide_resnet, (20, 1), "depth=20 must be 6n [+] 4"),
        (wide_resnet, (16, 0), "widening=0"),
    ],
)
def test_wrong_depth(config, arguments, told):
    with pytest.raises(ValueError, match=told):
        config(*arguments)


@pytest.mark.parametrize("block", ["basic", "preactivation"])
def test_other_norms_may_take_the_place_of_batch_norm(block):
    """The plain one of Flax computes the same."""
    config = ResNetConfig(SubKernelConv, 3, (1, 1), 4, "small", block)
    own, other = (ResNet(config, rngs=nnx.Rngs(0)) for _ in range(2))
    for module in [other, other.stem, *other.blocks]:
        for name, layer in vars(module).items():
            if isinstance(layer, nnx.BatchNorm):
                replaced = nnx.BatchNorm(layer.num_features, momentum=0.9, rngs=nnx.Rngs(0))
                setattr(module, name, replaced)
    (images,) = normal((2, 8, 8, 3))
    np.testing.assert_allclose(other(images), own(images), rtol=0, atol=1e-5)
