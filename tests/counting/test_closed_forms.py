"""The closed forms against the modules, against PyTorch, and against arithmetic by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest
import torch
from bsconv.pytorch import get_model
from flax import nnx
from layers import torch_shapes

from chansel_jax import (
    ChannelSelectionConv,
    ResNet,
    ResNetConfig,
    SubspaceChannelSelectionConv,
    cifar_resnet,
    wide_resnet,
)
from chansel_jax.counting import (
    LayerCount,
    break_even,
    chansel_cost,
    count,
    count_network,
    subkernel_cost,
)
from chansel_jax.networks.resnet import CONVS, PRESETS
from experiments.pytorch.networks import torch_twin


def config_of(preset, kind="chansel", **changes):
    return dataclasses.replace(PRESETS[preset], conv=CONVS[kind], **changes)


def abstract_twin(kind, config):
    with torch_shapes():
        return torch_twin(kind, config)


def parameter_count(module):
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def torch_multiply_adds(network, image_size):
    """Output shape and multiply-adds of every convolution and dense layer, as PyTorch runs them."""
    counts = {}

    def count(name, module, inputs, output):
        each = math.prod(module.weight.shape[1:])
        counts[name] = (tuple(output.shape[1:]), output.numel() * each)

    for name, module in network.named_modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(functools.partial(count, name))
    network(torch.zeros(1, 3, *image_size, device="meta"))
    return counts


@pytest.mark.parametrize(
    ("preset", "kind", "options", "parameters"),
    [
        ("resnet14", "subkernel", {}, 174_787),
        ("resnet14", "chansel", {}, 27_363),
        ("resnet14", "chansel", {"width": 32}, 97_731),
        ("resnet14", "chansel", {"replaced": "spatial"}, 27_267),
        ("resnet14", "chansel", {"width": 44}, 178_731),
        ("resnet14", "chansel", {"rank": 2}, 50_339),
        ("resnet14", "chansel", {"rank": 3}, 73_315),
        ("resnet14", "chansel", {"rank": 4}, 96_291),
        ("resnet18", "subkernel", {}, 11_689_512),
        ("resnet18", "chansel", {}, 1_954_024),
        ("resnet18", "chansel", {"use_bias": True}, 1_958_824),
        ("resnet34", "subkernel", {}, 21_797_672),  # torchvision's, as the next
        ("resnet50", "subkernel", {}, 25_557_032),
        ("resnet14", "subspace", {}, 15_971),
        ("cifar_resnet32", "subkernel", {}, 466_912),
        ("cifar_resnet32", "chansel", {}, 67_152),
        ("cifar_resnet44", "chansel", {}, 93_584),
    ],
)
def test_parameters_of_the_networks(preset, kind, options, parameters):
    config = config_of(preset, kind, **options)
    assert sum(row.parameters for row in count_network(config, 64)) == parameters
    assert sum(p.numel() for p in abstract_twin(kind, config).parameters()) == parameters


def test_twin_has_the_share_of_the_subspace():
    conv = functools.partial(SubspaceChannelSelectionConv, share=0.5, norm=True)
    config = config_of("resnet14", width=20, replaced="3x3", input_norm=True, use_bias=True)
    config = dataclasses.replace(config, conv=conv)
    expected = sum(p.numel() for p in abstract_twin("subspace", config).parameters())
    assert sum(row.parameters for row in count_network(config, 32)) == expected


AS_BSCONV = {"replaced": "3x3", "input_norm": True, "num_classes": 10}
BSCONV_NETWORKS = {  # besides those that a test of the commands' settings names
    "cifar_wrn16_1": PRESETS["cifar_wrn16_1"],
    "resnet10": config_of("resnet18", blocks=(1, 1, 1, 1), **AS_BSCONV),
    "resnet26": config_of("resnet18", blocks=(3, 3, 3, 3), **AS_BSCONV),
    "preresnet18": config_of("resnet18", block="preactivation", **AS_BSCONV),
    "cifar_preresnet20": dataclasses.replace(cifar_resnet(20), block="preactivation"),
}


@pytest.mark.parametrize(
    ("variant", "conv"),
    [
        ("", CONVS["subkernel"]),
        ("_bsconvu", CONVS["chansel"]),
        (
            "_bsconvs_p1d2",
            functools.partial(SubspaceChannelSelectionConv, share=1 / 2, norm=True),
        ),
        ("_bsconvs_p1d4", functools.partial(SubspaceChannelSelectionConv, norm=True)),
    ],
)
@pytest.mark.parametrize("name", BSCONV_NETWORKS)
def test_networks_have_the_parameters_of_bsconv(name, variant, conv):
    with torch_shapes():
        expected = sum(p.numel() for p in get_model(name + variant, num_classes=10).parameters())
    config = dataclasses.replace(BSCONV_NETWORKS[name], conv=conv)
    assert sum(row.parameters for row in count_network(config, 32)) == expected


@pytest.mark.parametrize(
    ("name", "conv"),
    [
        ("cifar_wrn16_1", CONVS["subkernel"]),
        ("cifar_preresnet20_bsconvu", CONVS["chansel"]),
        ("resnet10_bsconvs_p1d4", functools.partial(SubspaceChannelSelectionConv, norm=True)),
    ],
)
def test_networks_have_the_multiply_adds_of_bsconv(name, conv):
    with torch_shapes():
        counts = torch_multiply_adds(get_model(name, num_classes=10), (64, 48))
    config = dataclasses.replace(BSCONV_NETWORKS[name.partition("_bsconv")[0]], conv=conv)
    expected = sum(count for _, count in counts.values())
    assert sum(row.multiply_adds for row in count_network(config, (64, 48))) == expected


def test_parameters_of_a_wide_resnet_by_hand():
    """WRN-16-1 with BSConv-U: the stem, two blocks of 16, 32 and 64 channels, the classifier."""

    def conv(inputs, outputs):
        return inputs * outputs + 9 * outputs

    def block(inputs, outputs):
        shortcut = inputs * outputs if inputs != outputs else 0
        return 2 * inputs + conv(inputs, outputs) + 2 * outputs + conv(outputs, outputs) + shortcut

    first = 2 * 3 + conv(3, 16)  # BatchNorm of the images, and the stem
    stages = 2 * block(16, 16) + sum(block(c // 2, c) + block(c, c) for c in (32, 64))
    total = first + stages + 2 * 64 + 64 * 10 + 10
    assert total == 27_312
    assert sum(row.parameters for row in count_network(wide_resnet(16, 1), 32)) == total


KINDS = {
    "subspace": functools.partial(SubspaceChannelSelectionConv, norm=True),
    "subkernel": CONVS["subkernel"],
    "chansel": CONVS["chansel"],
    "normalised": functools.partial(ChannelSelectionConv, norm=True),
}


@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        ("subkernel", 1),
        ("chansel", 1),
        ("chansel", 2),
        ("chansel", 4),
        ("normalised", 3),
        ("subspace", 3),
    ],
)
@pytest.mark.parametrize(
    ("preset", "width"),
    [("resnet14", 6), ("resnet18", None), ("cifar_wrn16_2", None), ("resnet50", 16)],
)
def test_layers_are_the_modules_of_the_network(preset, width, kind, rank):
    config = dataclasses.replace(
        PRESETS[preset],
        conv=functools.partial(KINDS[kind], kernel_init=nnx.initializers.zeros),
        blocks=(1, 1),
        width=width or PRESETS[preset].width,
        rank=rank,
        use_bias=rank == 2,
        replaced="spatial" if rank == 4 else "all",
    )
    network = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    modules = {".".join(map(str, path)): m for path, m in nnx.iter_modules(network)}
    rows = count_network(config, (64, 48))
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        assert row.parameters == parameter_count(modules[row.name]), row.name
    assert sum(row.parameters for row in rows) == parameter_count(network)


@pytest.mark.parametrize("kind", [*KINDS.values(), nnx.Conv])
def test_groups_are_counted(kind):
    conv = functools.partial(kind, feature_group_count=2)
    config = ResNetConfig(conv, 3, (1, 1), 8, "plain")
    network = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    counted = count(network, jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32))
    rows = count_network(config, 8)
    assert sum(row.parameters for row in rows) == counted.parameters
    assert sum(row.multiply_adds for row in rows) == counted.multiply_adds


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize(
    ("preset", "image_size", "options"),
    [
        ("resnet14", (32, 32), {}),
        ("resnet14", (33, 47), {"rank": 4, "width": 8}),
        ("resnet18", (224, 224), {}),
        ("resnet50", (50, 64), {"blocks": (1, 2)}),
        ("cifar_resnet20", (33, 30), {"rank": 3}),
        ("resnet18", (65, 50), {"use_bias": True}),
    ],
)
def test_outputs_and_multiply_adds_are_those_of_torch(preset, kind, image_size, options):
    if kind == "subkernel":
        options = {name: value for name, value in options.items() if name != "rank"}
    config = config_of(preset, kind, **options)
    expected = {}
    for name, (output, multiply_adds) in torch_multiply_adds(
        abstract_twin(kind, config), image_size
    ).items():
        # The two parts of a channel selection count as one layer; the last layer is `fc` itself.
        layer = name.removesuffix(".conv2d").removesuffix(".fc").removesuffix(".subspace")
        before = expected.get(layer, (None, 0))[1]
        expected[layer] = (output, before + multiply_adds)
    rows = count_network(config, image_size)
    actual = [(row.output, row.multiply_adds) for row in rows if row.kind != "batch_norm"]
    assert actual == [((*o[1:], o[0]), count) for o, count in expected.values()]


def test_multiply_adds_of_resnet18_are_the_well_known_ones():
    rows = count_network(config_of("resnet18", "subkernel"), 224)
    assert sum(row.multiply_adds for row in rows) == 1_814_073_344


def test_multiply_adds_of_resnet14_by_hand():
    stem = 32 * 32 * 9 * 3 * 16
    dense_layer = 64 * 3
    # Two blocks of 16 channels on 32 × 32; then, on 16 × 16 and 8 × 8, a convolution that doubles
    # the channels, three that keep them, and the shortcut.
    stage1 = 4 * 32 * 32 * 9 * 16 * 16
    stage2 = 16 * 16 * (9 * 16 * 32 + 3 * 9 * 32 * 32 + 16 * 32)
    stage3 = 8 * 8 * (9 * 32 * 64 + 3 * 9 * 64 * 64 + 32 * 64)
    rows = count_network(config_of("resnet14", "subkernel"), 32)
    total = stem + stage1 + stage2 + stage3 + dense_layer
    assert sum(row.multiply_adds for row in rows) == total

    # A channel selection sums the channels at the size of its input.
    stage1 = 4 * 32 * 32 * (16 * 16 + 9 * 16)
    stage2 = 2 * 32 * 32 * 16 * 32 + 16 * 16 * (4 * 9 * 32 + 3 * 32 * 32 + 32)
    stage3 = 2 * 16 * 16 * 32 * 64 + 8 * 8 * (4 * 9 * 64 + 3 * 64 * 64 + 64)
    rows = count_network(config_of("resnet14"), 32)
    total = stem + stage1 + stage2 + stage3 + dense_layer
    assert sum(row.multiply_adds for row in rows) == total


def test_one_layer_of_each_kind_by_hand():
    # From a subspace of 4 of 20 channels, and of all 3.
    cost = chansel_cost(20, 7, 3, input_size=5, output_size=5, share=0.2, norm=True)
    parts = 20 * 4 + 4 * 7, 7 * 9
    assert cost == (sum(parts) + 7 + 2 * 4 + 2 * 7, 25 * sum(parts))
    cost = chansel_cost(3, 7, 3, input_size=5, output_size=5, share=0.5, use_bias=False)
    assert cost == (9 + 21 + 63, 25 * (9 + 21 + 63))
    # 4 × 3 outputs from 8 × 6 inputs; kernels of 2 · 5 elements, 3 channels in, 7 out.
    assert subkernel_cost(3, 7, (2, 5), output_size=(4, 3)) == (3 * 7 * 10 + 7, 12 * 3 * 7 * 10)
    cost = chansel_cost(3, 7, (2, 5), input_size=(8, 6), output_size=(4, 3), rank=2, norm=True)
    assert cost == (3 * 14 + 14 * 10 + 7 + 28, 48 * 3 * 14 + 12 * 14 * 10)
    *_, norm, linear = count_network(config_of("resnet14", num_classes=5), (9, 6))
    assert norm == LayerCount("blocks.5.norm2", "batch_norm", (3, 2, 64), 128, 0)
    assert linear == LayerCount("classifier", "linear", (5,), 64 * 5 + 5, 64 * 5)


@pytest.mark.parametrize("options", [{}, {"use_bias": False}])
def test_costs_need_no_module(options):
    bias = 0 if options else 6
    assert subkernel_cost(4, 6, 3, output_size=5, **options) == (216 + bias, 25 * 216)
    cost = chansel_cost(4, 6, 3, input_size=(10, 9), output_size=5, **options)
    assert cost == (24 + 54 + bias, 90 * 24 + 25 * 54)


@pytest.mark.parametrize(("kernel_size", "in_channels"), [(3, 9 / 8), ((1, 2), 2), (1, math.inf)])
def test_break_even(kernel_size, in_channels):
    assert break_even(kernel_size) == in_channels


@pytest.mark.parametrize("kernel_size", [1, 2, 3, (1, 2), (1, 3)])
def test_channel_selection_is_smaller_above_the_break_even(kernel_size):
    for in_channels in range(1, 8):
        dense, _ = subkernel_cost(in_channels, 5, kernel_size, output_size=1)
        chansel, _ = chansel_cost(in_channels, 5, kernel_size, input_size=1, output_size=1)
        assert (chansel < dense) == (in_channels > break_even(kernel_size))


def test_other_convolutions_have_no_closed_form():
    with pytest.raises(ValueError, match="conv=.*Conv"):
        count_network(dataclasses.replace(PRESETS["resnet14"], conv=nnx.ConvTranspose), 32)
    with pytest.raises(ValueError, match="config='resnet14' must be a ResNetConfig"):
        count_network("resnet14", 32)
    with pytest.raises(ValueError, match="in_channels=0 must be an integer of at least 1"):
        chansel_cost(0, 3, 3, input_size=1, output_size=1)


@pytest.mark.parametrize("image_size", [0, (32,), (32, 32, 3), 32.0])
def test_wrong_image_size(image_size):
    with pytest.raises(ValueError) as error:
        count_network(config_of("resnet14"), image_size)
    assert f"image_size={image_size!r}" in str(error.value)
