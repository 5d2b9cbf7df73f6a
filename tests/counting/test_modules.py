"""`count` against the closed forms, PyTorch's and BSConv's counters, and arithmetic by hand."""

import collections
import dataclasses
import functools
import math
import re
from pathlib import Path

import bsconv.pytorch
import flax.linen
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import layers
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec
from torch.utils.flop_counter import FlopCounterMode

import chansel_jax
from chansel_jax import (
    ChannelSelectionConv,
    ResNet,
    SubKernelConv,
    SubspaceChannelSelectionConv,
)
from chansel_jax.counting import Row, chansel_cost, count, count_network, subkernel_cost
from chansel_jax.networks.resnet import CONVS, PRESETS
from chansel_jax.ops.depthwise import depthwise_conv
from chansel_jax.ops.lowerings import runnable
from experiments.pytorch.networks import torch_twin

LOWERINGS = runnable(ChannelSelectionConv.LOWERINGS)


def shaped(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def by_path(counted):
    return {row.path: (row.parameters, row.multiply_adds) for row in counted.rows}


def abstract(kind, *args, **kwargs):
    """A module whose parameters are shapes."""
    return nnx.eval_shape(lambda: kind(*args, **kwargs, rngs=nnx.Rngs(0)))


def torch_multiply_adds(function):
    """Half of the floating-point operations that PyTorch counts while `function` runs."""
    with layers.torch_shapes(), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 2


# The layers of this package


@hypothesis.settings(deadline=None, max_examples=15)
@hypothesis.given(**layers.ANY_LAYER, rank=st.integers(1, 3), lowering=st.sampled_from(LOWERINGS))
def test_every_lowering_counts_as_the_closed_form(
    size, kernel_size, strides, padding, dilation, channels, rank, lowering
):
    rank = min(rank, channels[0], math.prod(kernel_size))
    window = {"strides": strides, "padding": padding, "kernel_dilation": dilation}
    layer = functools.partial(
        ChannelSelectionConv, *channels, kernel_size, rank=rank, lowering=lowering, **window
    )
    try:
        counted = count(abstract(layer), shaped(1, *size, channels[0]))
    except ValueError as error:
        assert "is smaller than a kernel" in str(error)
        return
    (row,) = counted.rows
    assert (row.path, row.kind) == ("", "ChannelSelectionConv")
    cost = chansel_cost(
        *channels, kernel_size, input_size=size, output_size=row.output[1:3], rank=rank
    )
    assert (row.parameters, row.multiply_adds) == cost


@pytest.mark.parametrize("lowering", SubKernelConv.LOWERINGS)
@pytest.mark.parametrize("function", ["output", "gradients"])
def test_the_dense_convolution(lowering, function):
    if lowering not in runnable(SubKernelConv.LOWERINGS):
        lowering = "auto"
    layer = abstract(SubKernelConv, 5, 8, (3, 2), 2, padding=1, lowering=lowering)
    call = {
        "output": layer,
        "gradients": functools.partial(nnx.grad(lambda m, x: m(x).sum(), argnums=(0, 1)), layer),
    }[function]
    expected = subkernel_cost(5, 8, (3, 2), output_size=(5, 6))
    counted = count(call, shaped(2, 9, 10, 5))
    times = {"output": 2, "gradients": 6}[function]  # of two images
    assert (counted.parameters, counted.multiply_adds) == (expected[0], times * expected[1])


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": "CIRCULAR"}, {"padding": "REFLECT", "strides": 2}, {"dtype": jnp.bfloat16}],
    ids=str,
)
def test_a_layer_and_its_gradients_by_hand(lowering, options):
    layer = abstract(ChannelSelectionConv, 4, 6, (3, 3), rank=2, lowering=lowering, **options)
    outputs = 5 * 5 if "strides" in options else 10 * 10
    forward = 10 * 10 * 4 * 12 + outputs * 12 * 9
    assert count(layer, shaped(1, 10, 10, 4)).multiply_adds == forward

    def loss(layer, x):
        return layer(x).astype(jnp.float32).sum()

    assert count(nnx.grad(loss), layer, shaped(1, 10, 10, 4)).multiply_adds == (
        3 * forward - 10 * 10 * 4 * 12  # the input's gradient is not asked for
    )
    grad = nnx.grad(loss, argnums=(0, 1))
    assert count(grad, layer, shaped(1, 10, 10, 4)).multiply_adds == 3 * forward


def test_what_else_asks_for_a_lowering_does_not_count():
    layer, x = abstract(ChannelSelectionConv, 4, 6, (3, 3)), shaped(1, 5, 5, 4)

    def composed(layer, x):
        with chansel_jax.lowering("composed"):
            return layer(x)

    with chansel_jax.lowering("composed"):
        for call in (functools.partial(composed, layer), layer):
            assert count(call, x).multiply_adds == 25 * (4 * 6 + 9 * 6)


@pytest.mark.parametrize("lowering", ["auto", "grouped"])
def test_groups_and_normalisation_by_hand(lowering):
    options = {"feature_group_count": 2, "norm": True, "lowering": lowering}
    layer = abstract(ChannelSelectionConv, 8, 6, (3, 3), **options)
    assert by_path(count(layer, shaped(3, 4, 5, 8))) == {
        "": (4 * 6 + 9 * 6 + 6, 3 * 20 * (4 * 6 + 9 * 6)),
        "norm": (12, 0),
    }


@pytest.mark.parametrize("lowering", ["auto", "grouped", "shifted"])
def test_the_depthwise_part_alone(lowering):
    function = functools.partial(depthwise_conv, lowering=lowering, strides=2)
    counted = count(function, shaped(2, 6, 8, 10), shaped(3, 3, 2, 5))
    assert (counted.parameters, counted.multiply_adds) == (0, 2 * 3 * 4 * 10 * 9)


def test_functions_that_were_differentiated_before():
    found = []

    def differentiate(layer, x):
        y, pull = jax.vjp(layer, x)
        _, push = jax.linearize(layer, x)
        found.extend((count(layer, x), count(pull, y), count(push, x)))
        return y

    nnx.eval_shape(
        differentiate, abstract(ChannelSelectionConv, 3, 4, (3, 3), 2), shaped(1, 8, 8, 3)
    )
    _, forward = chansel_cost(3, 4, 3, input_size=8, output_size=4)
    assert [counted.multiply_adds for counted in found] == [forward] * 3


@pytest.mark.parametrize(
    ("preset", "kind", "given", "options"),
    [
        ("resnet14", "chansel", {}, {"rank": 3, "use_bias": True}),
        ("resnet14", "chansel", {"norm": True}, {}),
        ("resnet14", "subkernel", {}, {}),
        ("resnet18", "chansel", {}, {}),
    ],
)
def test_the_networks_count_as_their_closed_forms(preset, kind, given, options):
    conv = functools.partial(CONVS[kind], kernel_init=nnx.initializers.zeros, **given)
    config = dataclasses.replace(PRESETS[preset], conv=conv, width=8, **options)
    counted = count(abstract(ResNet, config), shaped(1, 65, 50, 3))
    expected = count_network(config, (65, 50))
    for layer in expected:
        inside = [row for row in counted.rows if f"{row.path}.".startswith(f"{layer.name}.")]
        assert inside[0].output == (1, *layer.output)
        assert sum(row.parameters for row in inside) == layer.parameters
        assert sum(row.multiply_adds for row in inside) == layer.multiply_adds
    assert counted.parameters == sum(layer.parameters for layer in expected)
    assert counted.multiply_adds == sum(layer.multiply_adds for layer in expected)


# Against PyTorch and BSConv


@pytest.mark.parametrize(("kind", "training"), [("chansel", 0), ("subkernel", 0), ("subkernel", 1)])
def test_a_network_against_pytorch(kind, training):
    # PyTorch counts the kernel gradients of grouped convolutions as those of dense ones.
    config = dataclasses.replace(PRESETS["resnet14"], conv=CONVS[kind], width=8, blocks=(1, 1))
    with layers.torch_shapes():
        twin = torch_twin(kind, config)

    def of_torch():
        logits = twin(torch.zeros(2, 3, 32, 32))
        if training:
            logits.sum().backward()

    def loss(network, x):
        return network(x).sum()

    network = abstract(ResNet, config)
    counted = count(nnx.grad(loss) if training else ResNet.__call__, network, shaped(2, 32, 32, 3))
    assert counted.multiply_adds == torch_multiply_adds(of_torch)
    assert counted.parameters == sum(p.numel() for p in twin.parameters())


@pytest.mark.parametrize(
    ("of_flax", "of_torch", "options"),
    [
        (nnx.Conv, torch.nn.Conv2d, {"kernel": 3}),
        (nnx.Conv, torch.nn.Conv2d, {"kernel": 5, "strides": 3}),
        (nnx.Conv, torch.nn.Conv2d, {"strides": 2}),
        (nnx.Conv, torch.nn.Conv2d, {"kernel": 2, "dilation": 3}),
        (nnx.ConvTranspose, torch.nn.ConvTranspose2d, {"kernel": 3, "strides": 2}),
        (nnx.ConvTranspose, torch.nn.ConvTranspose2d, {"kernel": 2, "strides": 2}),
    ],
)
def test_convolutions_and_their_gradients_against_pytorch(of_flax, of_torch, options):
    kernel, strides, dilation = (options.get(name, 1) for name in ("kernel", "strides", "dilation"))
    given = {"padding": "VALID", "kernel_dilation": dilation}
    same = abstract(of_flax, 4, 6, (kernel, kernel), strides, **given)
    with layers.torch_shapes():
        twin = of_torch(4, 6, kernel, strides, dilation=dilation)

    def both(gradients):
        x = torch.zeros(2, 4, 13, 16, requires_grad=True)
        y = twin(x)
        if gradients:
            y.sum().backward()

    x = shaped(2, 13, 16, 4)
    grad = nnx.grad(lambda layer, x: layer(x).sum(), argnums=(0, 1))
    assert count(same, x).multiply_adds == torch_multiply_adds(lambda: both(False))
    assert count(grad, same, x).multiply_adds == torch_multiply_adds(lambda: both(True))


@pytest.mark.parametrize("groups", [2, 4])
def test_the_gradients_of_groups_count_as_the_convolution(groups):
    layer = abstract(nnx.Conv, 4, 8, (3, 3), 2, feature_group_count=groups)
    forward = 4 * 4 * 9 * 8 * 4 // groups
    grad = nnx.grad(lambda layer, x: layer(x).sum(), argnums=(0, 1))
    assert count(layer, shaped(1, 8, 8, 4)).multiply_adds == forward
    assert count(grad, layer, shaped(1, 8, 8, 4)).multiply_adds == 3 * forward


@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
@pytest.mark.parametrize("strides", [1, 2])
def test_against_the_profiler_of_bsconv(padding_mode, strides):
    twin = bsconv.pytorch.BSConvU(6, 10, 3, strides, 1, bias=False, padding_mode=padding_mode)
    profile = bsconv.pytorch.ModelProfiler(twin, input_size=(1, 6, 12, 9))
    padding = {"zeros": 1, "circular": "CIRCULAR"}[padding_mode]
    options = {"padding": padding, "use_bias": False}
    layer = abstract(ChannelSelectionConv, 6, 10, (3, 3), strides, **options)
    counted = count(layer, shaped(1, 12, 9, 6))
    assert counted.parameters == profile.total_parameter_count
    assert counted.multiply_adds == profile.total_flop_count


@pytest.mark.parametrize(
    ("name", "config", "image_size", "total"),
    [
        ("cifar_resnet20_bsconvu", PRESETS["cifar_resnet20"], 32, 7_850_634),
        (
            "cifar_wrn16_1_bsconvs_p1d4",
            dataclasses.replace(
                PRESETS["cifar_wrn16_1"],
                conv=functools.partial(SubspaceChannelSelectionConv, norm=True),
            ),
            32,
            4_013_706,
        ),
        (
            "resnet10",
            dataclasses.replace(
                PRESETS["resnet18"],
                conv=SubKernelConv,
                blocks=(1, 1, 1, 1),
                num_classes=10,
                input_norm=True,
            ),
            64,
            None,
        ),
    ],
)
def test_networks_against_the_profiler_of_bsconv(name, config, image_size, total):
    """It counts as much for convolutions without their bias, and counts other layers besides."""
    twin = bsconv.pytorch.get_model(name, num_classes=10)
    profile = bsconv.pytorch.ModelProfiler(twin, input_size=(1, 3, image_size, image_size))
    counted = count(abstract(ResNet, config), shaped(1, image_size, image_size, 3))
    layers, others = {}, collections.Counter()
    for path, found in profile.module_results.items():
        if not found["is_leaf"]:
            continue
        others[found["type"]] += found["flop_count"]
        if found["type"] == "Conv2d":
            biases = 0 if twin.get_submodule(path).bias is None else found["out_shape"][0]
            layer = re.sub(r"\.(pw|pw1|pw2|dw)$", "", path)
            layers[layer] = layers.get(layer, 0) + found["flop_count"] - biases
    rows = {row.path: row for row in counted.rows}
    of_config = [rows[each.path] for each in config.layers() if "norm" not in each.path]
    assert [row.multiply_adds for row in of_config] == list(layers.values())
    # Two operations for each element that BatchNorm takes, one for each bias of the classifier.
    norms = [math.prod(row.output) for row in counted.rows if row.kind == "BatchNorm"]
    assert others["BatchNorm2d"] == 2 * sum(norms)
    del others["Conv2d"], others["BatchNorm2d"]
    assert others.keys() <= {"ReLU", "MaxPool2d", "AdaptiveAvgPool2d"}
    of_both = counted.multiply_adds + 10 + 2 * sum(norms) + sum(others.values())
    assert profile.total_flop_count == of_both and total in (None, of_both)


# Networks of others


class Attention(nnx.Module):
    def __init__(self, features, *, rngs):
        self.query, self.key = (nnx.Linear(features, features, rngs=rngs) for _ in range(2))
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(self, x):
        scores = self.query(x) @ self.key(x).swapaxes(-1, -2)
        return jax.nn.softmax(scores * self.scale) @ x


class Block(nnx.Module):
    def __init__(self, *, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.linear(x)))


class Scanned(nnx.Module):
    def __init__(self, *, rngs):
        self.blocks = nnx.vmap(lambda rngs: Block(rngs=rngs))(rngs.split(3))

    def __call__(self, x):
        return nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)(
            self.blocks, x
        )


class Shared(nnx.Module):
    def __init__(self, *, rngs):
        self.parts = nnx.Dict(first=nnx.Linear(4, 4, rngs=rngs), gain=nnx.Param(jnp.ones(7)))
        self.second = self.parts.first
        self.unused = nnx.List([nnx.Linear(2, 3, rngs=rngs)])

    @nnx.jit
    def __call__(self, x):
        return self.second(jax.checkpoint(self.parts.first)(x))

    def twice(self, x):
        return self(self(x))


def test_work_between_modules_is_their_parents():
    x = shaped(2, 5, 8)
    rows = (
        Row("", "Attention", (2, 5, 8), 1, 2 * (2 * 5 * 5 * 8)),
        Row("query", "Linear", (2, 5, 8), 72, 2 * 5 * 8 * 8),
        Row("key", "Linear", (2, 5, 8), 72, 2 * 5 * 8 * 8),
    )
    counted = count(Attention(8, rngs=nnx.Rngs(0)), x)
    assert counted.rows == rows
    assert (counted.parameters, counted.multiply_adds) == (145, 800 + 2 * 640)
    assert count(abstract(Attention, 8), x) == counted


def test_layers_in_a_scan_and_under_vmap():
    network = abstract(Scanned)
    network.eval()
    expected = {"linear": (3 * 20, 3 * 2 * 16), "norm": (3 * 8, 0)}
    assert by_path(count(network, shaped(2, 4))) == {
        f"blocks.{path}": costs for path, costs in expected.items()
    }
    mapped = nnx.vmap(lambda block, x: block(x), in_axes=(0, None))
    assert by_path(count(mapped, network.blocks, shaped(2, 4))) == expected
    # Forward twice, for the first time's results are not kept, and two products backward.
    remat = nnx.remat(lambda block, x: block(x))
    block = abstract(Block)
    block.eval()
    grad = nnx.grad(lambda block, x: jnp.sin(remat(block, jnp.sin(x))).sum(), argnums=(0, 1))
    assert by_path(count(remat, block, shaped(2, 4)))["linear"] == (20, 32)
    assert by_path(count(grad, block, shaped(2, 4)))["linear"] == (20, 4 * 32)


def test_what_is_shared_counts_once_and_what_is_called_twice_twice():
    network = abstract(Shared)
    for call, times in ((network, 2), (network, 2), (network.twice, 4)):
        assert by_path(count(call, shaped(3, 4))) == {
            "": (7, 0),
            "parts.first": (20, times * 3 * 16),
            "unused.0": (9, 0),
        }


def test_modules_among_the_arguments_and_around_the_function():
    first, second = (abstract(nnx.Linear, 3, 3) for _ in range(2))
    x = shaped(2, 3)

    def function(modules, x, *, product):
        y = modules["second"](modules["first"](x))
        return y @ x.T if product else y

    modules = {"first": first, "second": second}
    assert by_path(count(function, modules, x, product=False)) == {
        "0.first": (12, 18),
        "0.second": (12, 18),
    }
    counted = count(function, modules, x, product=True)
    assert counted.rows[-1] == Row("", "function", (2, 2), 0, 12)
    counted = count(lambda module, x: module(x) @ x.T, first, x)
    assert counted.rows == (
        Row("", "Linear", (2, 3), 12, 18),
        Row("", "<lambda>", (2, 2), 0, 12),
    )
    assert by_path(count(functools.partial(first), x)) == {"": (12, 18)}
    graph, state = nnx.split(first)
    counted = count(lambda graph, state, x: nnx.merge(graph, state)(x), graph, state, x)
    assert (counted.parameters, counted.multiply_adds) == (12, 18)
    outside = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    (row,) = count(lambda x: outside(x), x).rows
    assert (row.kind, row.parameters, row.multiply_adds) == ("<lambda>", 0, 18)


def test_modules_of_linen():
    dense = nnx.bridge.ToNNX(flax.linen.Dense(5), rngs=nnx.Rngs(0)).lazy_init(jnp.ones((2, 3)))
    assert count(dense, shaped(2, 3)).rows == (Row("", "ToNNX", (2, 5), 20, 30),)


def test_nothing_changes():
    block = Block(rngs=nnx.Rngs(0))
    methods = dict(vars(Block)), dict(vars(nnx.Linear)), dict(vars(nnx.BatchNorm))
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(block, nnx.Not(nnx.RngKey))))
    attributes = [sorted(vars(module)) for _, module in nnx.iter_modules(block)]
    for shape, refused in (((2, 4), False), ((2, 5), True)):
        if refused:
            with pytest.raises(TypeError):
                count(block, shaped(*shape))
        else:
            assert count(block, shaped(*shape)).multiply_adds == 2 * 16
    after = nnx.to_pure_dict(nnx.state(block, nnx.Not(nnx.RngKey)))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert attributes == [sorted(vars(module)) for _, module in nnx.iter_modules(block)]
    assert methods == (dict(vars(Block)), dict(vars(nnx.Linear)), dict(vars(nnx.BatchNorm)))


# Operations


def test_loops_and_branches():
    x = shaped(3, 3)

    def branches(x):
        return lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: (x @ x) @ x, x)

    def until(x):
        return lax.while_loop(lambda x: x.sum() < 3, lambda x: x @ x, x)

    def times(x):
        return lax.fori_loop(0, 7, lambda _, x: branches(x), x)

    for function, products, at_least in (
        (branches, 2, False),
        (times, 14, False),
        (until, 1, True),
        (lambda x: times(until(x)), 15, True),
        (lambda x: lax.while_loop(lambda x: x.sum() < 3, jnp.sin, x) @ x, 1, False),
        (lambda x: jnp.linalg.solve(x, x @ x), 1, False),
    ):
        counted = count(function, x)
        assert (counted.multiply_adds, counted.at_least) == (27 * products, at_least)
    assert "≥ 27" in str(count(until, x))


def test_products_of_groups_of_rows():
    arrays = shaped(10, 3), shaped(2, 3, 4), jax.ShapeDtypeStruct((2,), jnp.int32)
    assert count(lax.ragged_dot, *arrays).multiply_adds == 10 * 3 * 4
    grad = jax.grad(lambda *arrays: lax.ragged_dot(*arrays).sum(), argnums=(0, 1))
    assert count(grad, *arrays).multiply_adds == 3 * 10 * 3 * 4


def test_what_runs_on_several_devices_and_blocks():
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("batch")
    divided = jax.shard_map(
        lambda x, w: x @ w, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec
    )
    rows = 2 * jax.device_count()
    assert count(divided, shaped(rows, 3), shaped(3, 4)).multiply_adds == rows * 3 * 4

    def kernel(x, w, out):
        out[...] = x[...] @ w[...]

    blocks = pl.pallas_call(
        kernel,
        out_shape=shaped(6, 4),
        grid=(3,),
        in_specs=[pl.BlockSpec((2, 3), lambda i: (i, 0)), pl.BlockSpec((3, 4), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((2, 4), lambda i: (i, 0)),
        interpret=True,
    )
    assert count(blocks, shaped(6, 3), shaped(3, 4)).multiply_adds == 6 * 3 * 4


@pytest.mark.parametrize("function", [3, nnx.List([])], ids=str)
def test_what_cannot_be_called(function):
    with pytest.raises(ValueError, match="^function=.* must be a module or a function"):
        count(function, shaped(1))


def test_the_table_in_the_readme():
    text = (Path(__file__).parents[2] / "chansel_jax" / "README.md").read_text()
    code, printed = re.search(
        r"^## Counting\n.*?^```python\n(.*?)^```\n.*?^```text\n(.*?)^```", text, re.M | re.S
    ).groups()
    lines = []
    exec(
        compile(code, "README.md", "exec"),
        {"print": lambda *each: lines.append(" ".join(map(str, each)))},
    )
    assert "\n".join(lines) + "\n" == printed
