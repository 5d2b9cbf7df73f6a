"""The residual block and the networks: against PyTorch, in both modes, and by their arguments."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_twins import TorchResNet, torch_resnet14, torch_resnet18

from chansel_jax import (
    ChannelSelectionConv,
    ResNet,
    ResNetConfig,
    SubKernelConv,
    resnet14,
    resnet18,
)
from chansel_jax.resnet import CONVS, PRESETS
from chansel_jax.torch_weights import from_torch, to_torch

BATCH = 4

# The logits are float32 whatever the computation is, so that no gradient is known more closely.
LOGITS = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def unset(kind):
    """The convolution, without the time that initialising it takes."""
    return functools.partial(CONVS[kind], kernel_init=nnx.initializers.zeros)


def randomised(twin):
    """`twin` in float64, its BatchNorms with other values than the initial zeros and ones."""
    twin.double()
    for module in twin.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.3)
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return twin


def carried(network, twin):
    """`network` in float64 with the weights and running statistics of `twin`."""
    state = nnx.state(network, (nnx.Param, nnx.BatchStat))
    nnx.update(network, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), state))
    from_torch(network, twin.state_dict())
    return network


def step(network, part, loss, x):
    """Loss, gradient of `x`, and `to_torch` after a step: gradients in the parameters' places."""
    graphdef, params, rest = nnx.split(part, nnx.Param, ...)

    @jax.jit
    def loss_and_gradients(params, rest, x):
        def loss_of(params, x):
            module = nnx.merge(graphdef, params, rest, copy=True)
            return loss(module(x)), nnx.state(module, nnx.BatchStat)

        return jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(params, x)

    (value, stats), (gradients, x_gradient) = loss_and_gradients(params, rest, x)
    nnx.update(part, gradients, stats)
    return value, x_gradient, to_torch(network)


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


def nchw(x):
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("kind", CONVS)
def test_block_is_that_of_torch(x64, kind, strides, train):
    torch.manual_seed(0)
    shape = {"num_classes": 2, "width": 8, "blocks": (1, 1), "stem": "plain"}
    twin = randomised(TorchResNet(kind, **shape)).train(train)
    config = ResNetConfig(conv=unset(kind), dtype=jnp.float64, **shape)
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
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-12)
    np.testing.assert_allclose(nchw(np.asarray(actual[1])), expected[1], rtol=1e-9, atol=1e-11)
    chex.assert_trees_all_close(
        *(
            {n: a for n, a in tree.items() if n.startswith(name)}
            for tree in (actual[2], expected[2])
        ),
        rtol=1e-9,
        atol=1e-11,
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("subkernel", {}),
        ("chansel", {}),
        ("chansel", {"rank": 3, "use_bias": True}),
    ],
)
@pytest.mark.parametrize(
    ("preset", "twin_preset", "size"),
    [(resnet14, torch_resnet14, 32), (resnet18, torch_resnet18, 64)],
)
def test_networks_are_those_of_torch(x64, preset, twin_preset, size, kind, options):
    torch.manual_seed(0)
    twin = randomised(twin_preset(kind, 10, width=8, **options))
    network = preset(
        unset(kind), 10, width=8, dropout_rate=0.0, dtype=jnp.float64, rngs=nnx.Rngs(0), **options
    )
    carried(network, twin)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((BATCH, size, size, 3))
    labels = rng.integers(10, size=BATCH)

    network.eval()
    logits = jax.jit(lambda state, x: nnx.merge(nnx.graphdef(network), state)(x))(
        nnx.state(network), images
    )
    with torch.no_grad():
        expected = twin.eval()(nchw(images))
    assert logits.dtype == jnp.float32
    chex.assert_trees_all_close(np.asarray(logits), expected.float().numpy(), **LOGITS)

    def cross_entropy(logits):
        return -jax.nn.log_softmax(logits)[jnp.arange(BATCH), labels].mean()

    def torch_cross_entropy(logits):
        return torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))

    network.train()
    twin.train()
    expected = torch_step(twin, twin, torch_cross_entropy, nchw(images).requires_grad_())
    actual = step(network, network, cross_entropy, jnp.asarray(images))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(nchw(np.asarray(actual[1])), expected[1], **LOGITS)
    chex.assert_trees_all_close(actual[2], expected[2], **LOGITS)
    dev = max(float(np.abs(actual[2][k] - expected[2][k]).max()) for k in actual[2])
    print(
        "DEV",
        dev,
        max(
            float(np.abs(actual[2][k] - expected[2][k]).max() / np.abs(expected[2][k]).max())
            for k in actual[2]
        ),
        abs(actual[0] - expected[0]),
        abs(np.asarray(logits)).max(),
    )
