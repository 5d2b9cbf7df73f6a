"""State dicts of PyTorch in and out: names, layouts, and what does not fit."""

import dataclasses
import functools
import re
import types
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from bsconv.pytorch import BSConvS, BSConvS_Replacer, BSConvU, BSConvU_Replacer
from bsconv.pytorch.resnet import build_resnet
from flax import nnx
from layers import with_random_norms

from chansel_jax import (
    ChannelSelectionConv,
    ResNet,
    ResNetConfig,
    SubKernelConv,
    SubspaceChannelSelectionConv,
    resnet14,
    resnet18,
)
from chansel_jax.networks.resnet import CONVS, PRESETS
from chansel_jax.torch_weights import (
    from_torch,
    load_safetensors,
    save_safetensors,
    to_numpy,
    to_torch,
)
from experiments.benchmarking.contestants.weights import uninitialised
from experiments.pytorch.networks import WeightedSumConv2d, torch_twin


def small(preset=resnet14, conv=ChannelSelectionConv, **options):
    """A network of width 4, uninitialised but for its kind and shape."""
    zeros = functools.partial(conv, kernel_init=nnx.initializers.zeros)
    return preset(zeros, width=4, rngs=nnx.Rngs(0), **options)


def variables(network):
    """Everything a state dict holds, as NumPy arrays of the network's own layout."""
    state = nnx.state(network, (nnx.Param, nnx.BatchStat))
    return jax.tree.map(np.array, nnx.to_pure_dict(state))


def numbered(network):
    """Arrays of `network`'s shapes, no two elements of which are alike."""
    arrays = to_numpy(network)
    ends = np.cumsum([array.size for array in arrays.values()])
    return {
        name: np.arange(end - array.size, end, dtype=np.float32).reshape(array.shape)
        for end, (name, array) in zip(ends, arrays.items(), strict=True)
    }


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize(("preset", "options"), [(resnet14, {}), (resnet18, {"use_bias": True})])
def test_state_dicts_are_those_of_torch(preset, options, kind):
    network = small(preset, CONVS[kind], **options)
    twin = torch_twin(kind, network.config)
    before = twin.state_dict()
    expected = {name: tuple(a.shape) for name, a in before.items() if "batches" not in name}
    assert {name: array.shape for name, array in to_numpy(network).items()} == expected

    from_torch(network, before)
    chex.assert_trees_all_equal(
        to_numpy(network), {name: before[name].numpy() for name in expected}
    )
    values = numbered(network)
    twin.load_state_dict({name: torch.from_numpy(array) for name, array in values.items()})
    chex.assert_trees_all_equal({n: twin.state_dict()[n].numpy() for n in expected}, values)


@pytest.mark.parametrize("kind", ["chansel", "subspace"])
def test_norms_between_the_parts_are_those_of_torch(kind):
    network = small(conv=functools.partial(CONVS[kind], norm=True))
    theirs = torch_twin(kind, network.config).state_dict()
    expected = {name: tuple(a.shape) for name, a in theirs.items() if "batches" not in name}
    assert "layer1.0.conv1.bn.running_var" in expected
    assert {name: array.shape for name, array in to_numpy(network).items()} == expected


def test_layouts():
    network = small(rank=2)
    values = numbered(network)
    from_torch(network, values)
    block = network.blocks[2]
    o, r, i, h, w = 5, 1, 3, 0, 2
    pointwise = values["layer2.0.conv1.fc.weight"]
    assert pointwise.shape == (16, 4)
    assert block.conv1.pointwise[i, o * 2 + r] == pointwise[o * 2 + r, i]
    depthwise = values["layer2.0.conv1.conv2d.weight"]
    assert depthwise.shape == (8, 2, 3, 3)
    assert block.conv1.depthwise[h, w, r, o] == depthwise[o, r, h, w]
    stem = values["conv1.weight"]
    assert stem.shape == (4, 3, 3, 3)
    assert network.stem.conv.kernel[h, w, 1, 3] == stem[3, 1, h, w]
    assert network.classifier.kernel[i, 2] == values["fc.weight"][2, i]
    norm = block.shortcut_norm
    for variable, name in [
        (norm.scale, "weight"),
        (norm.bias, "bias"),
        (norm.mean, "running_mean"),
        (norm.var, "running_var"),
    ]:
        np.testing.assert_array_equal(variable[...], values[f"layer2.0.downsample.1.{name}"])


def test_names_of_torchvision():
    names = to_numpy(small(resnet18, SubKernelConv)).keys()
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv1.weight",
        "layer1.1.bn2.bias",
        "layer2.0.downsample.0.weight",
        "layer2.0.downsample.1.running_var",
        "layer4.1.conv2.weight",
        "fc.weight",
        "fc.bias",
    } <= names
    assert len(names) == 102  # torchvision's 122, less 20 counters of batches


def test_names_of_a_normalised_layer():
    network = small(resnet18, functools.partial(ChannelSelectionConv, norm=True), use_bias=True)
    twin = WeightedSumConv2d(3, 4, 7, norm=True).state_dict()
    for name in ("conv1", "layer1.0.conv2", "layer2.0.downsample.0"):
        prefix = name + "."
        names = {n.removeprefix(prefix) for n in to_numpy(network) if n.startswith(prefix)}
        assert names == {n for n in twin if "batches" not in n}
    values = numbered(network)
    from_torch(network, values)
    chex.assert_trees_all_equal(to_numpy(network), values)


def test_tensors_that_require_a_gradient():
    network = small()
    twin = torch_twin("chansel", network.config)
    from_torch(network, dict(twin.named_parameters()) | dict(twin.named_buffers()))
    np.testing.assert_array_equal(network.classifier.bias[...], twin.fc.bias.detach().numpy())


def test_values_are_cast_to_the_dtype_of_the_network():
    network = small()
    values = numbered(network)
    from_torch(network, {name: array.astype(np.float64) for name, array in values.items()})
    assert {leaf.dtype for leaf in jax.tree.leaves(variables(network))} == {np.dtype(np.float32)}
    chex.assert_trees_all_equal(to_numpy(network), values)


def test_memory_is_not_shared():
    network = small()
    twin = torch_twin("chansel", network.config)
    from_torch(network, twin.state_dict())
    before = variables(network)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.add_(1)
    chex.assert_trees_all_equal(variables(network), before)
    for array in to_numpy(network).values():
        array += 1
    chex.assert_trees_all_equal(variables(network), before)


def test_all_problems_are_reported_and_nothing_is_loaded():
    network = small()
    before = variables(network)
    arrays = numbered(network)
    del arrays["conv1.bias"], arrays["layer3.1.bn2.running_var"]
    arrays["layer4.0.conv1.weight"] = np.zeros((3, 3))
    arrays["fc.weight"] = arrays["fc.weight"].T
    arrays["bn1.num_batches_tracked"] = np.array(3)
    with pytest.raises(ValueError) as error:
        from_torch(network, arrays)
    assert set(str(error.value).splitlines()[1:]) == {
        "conv1.bias is missing",
        "layer3.1.bn2.running_var is missing",
        "layer4.0.conv1.weight is unexpected",
        "fc.weight has shape (16, 3), not (3, 16)",
    }
    chex.assert_trees_all_equal(variables(network), before)


def test_a_name_that_ends_as_one_of_the_network_by_chance_is_no_prefix():
    given = {"deep.bn1.weight": np.zeros(4), "conv9.weight": np.zeros(4)}
    with pytest.raises(ValueError, match="2 unexpected") as refused:
        from_torch(small(), given)
    assert "\nlayer1.0.conv1.fc.weight is missing" in str(refused.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.net."])
def test_what_all_names_have_in_front(prefix):
    network = small()
    values = numbered(network)
    given = {prefix + name: value for name, value in values.items()}
    from_torch(network, given | {f"{prefix}bn1.num_batches_tracked": np.array(3)})
    chex.assert_trees_all_equal(to_numpy(network), values)

    layer = SubKernelConv(2, 3, (1, 1), use_bias=False, rngs=nnx.Rngs(0))
    from_torch(layer, {f"{prefix}weight": np.ones((3, 2, 1, 1))})
    assert (layer.kernel[...] == 1).all()

    del given[f"{prefix}conv1.bias"]
    with pytest.raises(ValueError) as error:
        from_torch(network, given | {"n_averaged": np.array(3)})
    _, *problems = str(error.value).splitlines()
    assert problems == [f"{prefix}conv1.bias is missing", "n_averaged is unexpected"]


def test_tensors_of_every_dtype_and_layout():
    layer = SubKernelConv(2, 3, (3, 1), rngs=nnx.Rngs(0))
    values = torch.arange(18.0).reshape(3, 2, 3, 1) - 9
    for weight in (
        values.bfloat16(),
        values.to(torch.float8_e5m2),
        values.to(torch.int8),
        values > 0,
        values.to_sparse(),
        values.bfloat16().to_sparse().requires_grad_(),
        torch.complex(values, -values).conj().imag,  # its negative bit is set
        torch.nn.Parameter(values.double()),
    ):
        from_torch(layer, {"weight": weight, "bias": torch.ones(3)})
        expected = weight.detach().to_dense().double().resolve_neg().numpy()
        np.testing.assert_array_equal(to_numpy(layer)["weight"], expected)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.empty(3, device="meta"), "Cannot copy out of meta tensor; no data!"),
        (torch.ones(3, dtype=torch.complex64), "complex64 is no dtype of real numbers"),
        (torch.ones(3, dtype=torch.complex64).conj(), "complex64 is no dtype of real numbers"),
        (np.full(3, "1"), "<U1 is no dtype of real numbers"),
        (None, "object is no dtype of real numbers"),
    ],
)
def test_values_that_are_none_or_not_real_are_named(value, told):
    layer = SubKernelConv(2, 3, (1, 1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError) as error:
        from_torch(layer, {"weight": torch.ones(3, 2, 1, 1), "bias": value})
    (line,) = str(error.value).splitlines()[1:]
    assert line.startswith(f"bias has no values that can be taken: {told}")


def test_of_many_problems_the_first_are_told_and_all_counted():
    network = small(resnet18)
    arrays = {f"{name}.old": array for name, array in to_numpy(network).items()}
    count = len(arrays)
    arrays["fc.bias"] = np.ones(7)
    with pytest.raises(ValueError) as error:
        from_torch(network, arrays)
    first, *lines, last = str(error.value).splitlines()
    assert f"({count - 1} missing, {count} unexpected, 1 of another shape)" in first
    assert len(lines) == 8 and all(line.endswith(" is missing") for line in lines)
    assert last == f"and {2 * count - 8} more"


# The package bsconv


def randomised(module):
    """`module` in evaluation, its BatchNorms with other values than the initial zeros and ones."""
    torch.manual_seed(0)
    return with_random_norms(module).eval()


REPLACERS = {
    "subkernel": lambda module: module,
    "chansel": BSConvU_Replacer().apply,
    "subspace": BSConvS_Replacer(with_bn=True).apply,
}


def of_bsconv(kind, *, preactivation=False, large=False, units=(1, 1)):
    """A network of the package, and ours of the same shape."""
    torch.manual_seed(0)
    theirs = REPLACERS[kind](
        build_resnet(5, units, width_multiplier=0.5, preact=preactivation, cifar=not large)
    )
    conv = {**CONVS, "subspace": functools.partial(SubspaceChannelSelectionConv, norm=True)}[kind]
    config = ResNetConfig(
        functools.partial(conv, kernel_init=nnx.initializers.zeros),
        num_classes=5,
        blocks=units,
        width=32 if large else 8,
        stem_width=64 if large else 16,
        stem="pooled" if large else "small",
        block="preactivation" if preactivation else "basic",
        input_norm=True,
        replaced="3x3",
    )
    return randomised(theirs), ResNet(config, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("subkernel", {"preactivation": True}),
        ("chansel", {}),
        ("chansel", {"large": True}),
        ("subspace", {"preactivation": True}),
    ],
)
def test_networks_of_bsconv_and_back(kind, options):
    theirs, ours = of_bsconv(kind, **options)
    from_torch(ours, theirs.state_dict(), names="bsconv")
    ours.eval()
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 3), np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    logits = nnx.jit(lambda network, x: network(x))(ours, x)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    back, _ = of_bsconv(kind, **options)
    for tensor in back.state_dict().values():
        tensor.zero_()
    back.load_state_dict(to_torch(ours, names="bsconv"))
    for name, tensor in theirs.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(back.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("theirs", "layer"),
    [
        (BSConvU, functools.partial(ChannelSelectionConv, norm=True)),
        (BSConvS, functools.partial(SubspaceChannelSelectionConv, norm=True)),
    ],
)
def test_layers_of_bsconv(theirs, layer):
    torch.manual_seed(0)
    twin = randomised(theirs(20, 6, 3, padding=1, with_bn=True))
    ours = layer(20, 6, (3, 3), padding=1, rngs=nnx.Rngs(0))
    from_torch(ours, twin.state_dict(), parts="bsconv")
    ours.eval()
    x = torch.randn(2, 20, 5, 4)
    expected = twin(x).detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours(x.numpy().transpose(0, 2, 3, 1)), expected, atol=1e-5)


# Other modules, and files


class Encoder(nnx.Module):
    """Of Flax's own layers."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.convs = nnx.List(
            [
                nnx.Conv(4, 6, (3, 2), padding="VALID", feature_group_count=2, rngs=rngs),
                nnx.Conv(6, 6, (1, 1), use_bias=False, rngs=rngs),
            ]
        )
        self.norm = nnx.GroupNorm(6, num_groups=3, epsilon=1e-5, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        for conv in self.convs:
            x = conv(x)
        return self.head(self.norm(x).mean((1, 2)))


class TorchEncoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(4, 6, (3, 2), groups=2)
        self.second = torch.nn.Conv2d(6, 6, 1, bias=False)
        self.norm = torch.nn.GroupNorm(3, 6)
        self.head = torch.nn.Linear(6, 3)
        torch.nn.init.normal_(self.norm.weight)

    def forward(self, x):
        return self.head(self.norm(self.second(self.first(x))).mean((2, 3)))


def test_any_module_with_a_mapping():
    torch.manual_seed(0)
    theirs, ours = TorchEncoder(), Encoder()
    names = {"convs.0": "first", "convs.1": "second"}
    from_torch(ours, theirs.state_dict(), names=names)
    x = torch.randn(2, 4, 6, 5)
    expected = theirs(x).detach().numpy()
    np.testing.assert_allclose(ours(x.numpy().transpose(0, 2, 3, 1)), expected, atol=1e-5)
    arrays = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    chex.assert_trees_all_equal(to_numpy(ours, names=names), arrays)
    with pytest.raises(ValueError, match="names: 'convs.2' is no layer of the module"):
        to_numpy(ours, names={"convs.2": "third"})


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize(
    ("kernel_size", "strides", "dilation", "padding"),
    [((3,), 2, 1, 1), ((2, 3), (1, 2), (1, 2), (0, 1)), ((2, 2, 3), 1, 1, (1, 0, 1))],
)
def test_transposed_convolutions(kernel_size, strides, dilation, padding, transpose_kernel):
    dimensions = len(kernel_size)
    torch.manual_seed(0)
    kind = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)
    theirs = kind[dimensions - 1](2, 3, kernel_size, strides, padding, dilation=dilation)
    ours = nnx.ConvTranspose(
        2,
        3,
        kernel_size,
        strides,
        # Ours counts from the outputs that the input alone reaches, PyTorch's from all.
        padding=[
            ((d * (k - 1) - p),) * 2
            for k, d, p in zip(kernel_size, theirs.dilation, theirs.padding, strict=True)
        ],
        kernel_dilation=dilation,
        transpose_kernel=transpose_kernel,
        rngs=nnx.Rngs(0),
    )
    from_torch(ours, theirs.state_dict())
    x = torch.randn(2, 2, *range(4, 4 + dimensions))
    expected = theirs(x).movedim(1, -1).detach().numpy()
    np.testing.assert_allclose(ours(x.movedim(1, -1).numpy()), expected, atol=1e-5)
    for name, tensor in to_torch(ours).items():
        assert torch.equal(tensor, theirs.state_dict()[name])


def test_a_transposed_convolution_by_hand():
    layer = nnx.ConvTranspose(1, 1, 3, padding="VALID", rngs=nnx.Rngs(0))
    from_torch(layer, {"weight": np.array([[[1, 2, 3]]]), "bias": np.zeros(1)})
    pulses = jnp.array([1.0, 0, 0, 10]).reshape(1, 4, 1)
    np.testing.assert_array_equal(layer(pulses).ravel(), [1, 2, 3, 10, 20, 30])
    np.testing.assert_array_equal(layer.kernel[...].ravel(), [3, 2, 1])


class TorchUNet(torch.nn.Module):
    """The README's."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 16, 3, padding=1)
        self.down = torch.nn.Conv2d(16, 32, 3, stride=2)
        self.norm = torch.nn.BatchNorm2d(32)
        self.up = torch.nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.joined = torch.nn.Conv2d(32, 16, 3, padding=1)
        self.head = torch.nn.Conv2d(16, 1, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        y = self.down(torch.nn.functional.pad(x, (0, 1, 0, 1)))  # "SAME"
        y = self.up(self.norm(y).relu())
        return self.head(self.joined(torch.cat([x, y], dim=1)).relu())


def unet(seed):
    readme = Path(__file__).parents[1] / "chansel_jax" / "README.md"
    (code,) = re.findall(r"## All the way.*?```python\n(.*?)\ndense = ", readme.read_text(), re.S)
    exec(code, names := {})
    return names["UNet"](rngs=nnx.Rngs(seed))


class ConvNextBlock(nnx.Module):
    config = types.SimpleNamespace(blocks=1)  # which is no `ResNetConfig`

    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.depthwise = nnx.Conv(6, 6, (3, 3), feature_group_count=6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.mlp = nnx.List([nnx.Linear(6, 24, rngs=rngs), nnx.Linear(24, 6, rngs=rngs)])
        self.layer_scale = nnx.Param(jnp.full(6, 1e-6))

    def __call__(self, x):
        y = self.mlp[0](self.norm(self.depthwise(x)))
        y = self.mlp[1](nnx.gelu(y, approximate=False))
        return x + self.layer_scale.reshape(1, 1, 1, 6) * y


class TorchConvNextBlock(torch.nn.Module):
    """As torchvision's, but for the names."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = torch.nn.LayerNorm(6, eps=1e-6)
        self.rise, self.fall = torch.nn.Linear(6, 24), torch.nn.Linear(24, 6)
        self.gamma = torch.nn.Parameter(torch.rand(6))
        torch.nn.init.normal_(self.norm.weight)

    def forward(self, x):
        y = self.rise(self.norm(self.conv(x).movedim(1, -1)))
        return x + (self.gamma * self.fall(torch.nn.functional.gelu(y))).movedim(-1, 1)


OF_CONVNEXT = {
    "depthwise": "conv",
    "mlp.0": "rise",
    "mlp.1": "fall",
    "layer_scale": "gamma",
}


@pytest.mark.parametrize(
    ("theirs", "make", "channels", "names"),
    [(TorchUNet, unet, 3, {}), (TorchConvNextBlock, ConvNextBlock, 6, OF_CONVNEXT)],
)
def test_networks_that_are_not_ours(tmp_path, theirs, make, channels, names):
    torch.manual_seed(0)
    theirs, ours, other = randomised(theirs()), make(0), make(1)
    from_torch(ours, theirs.state_dict(), names=names)
    ours.eval()
    x = torch.randn(2, channels, 8, 6)
    expected = theirs(x).movedim(1, -1).detach().numpy()
    np.testing.assert_allclose(ours(x.movedim(1, -1).numpy()), expected, atol=1e-5)
    arrays = {n: v.numpy() for n, v in theirs.state_dict().items() if "batches" not in n}
    chex.assert_trees_all_equal(to_numpy(ours, names=names), arrays)
    save_safetensors(ours, tmp_path / "ours.safetensors")
    load_safetensors(other, tmp_path / "ours.safetensors")
    chex.assert_trees_all_equal(variables(other), variables(ours))


def test_attention():
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    torch.nn.init.normal_(theirs.in_proj_bias)
    ours = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    arrays = theirs.state_dict()
    for kind in ("weight", "bias"):
        three = arrays.pop(f"in_proj_{kind}").chunk(3)
        arrays |= {f"{n}.{kind}": v for n, v in zip(("query", "key", "value"), three, strict=True)}
    from_torch(ours, arrays, names={"out": "out_proj"})
    x, y = torch.randn(2, 3, 5, 8)
    expected, _ = theirs(x, y, y)
    np.testing.assert_allclose(ours(x.numpy(), y.numpy()), expected.detach(), atol=1e-5)
    back = to_torch(ours, names={"out": "out_proj"})
    assert back.keys() == arrays.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in arrays.items())


class Codebook(nnx.Variable):
    """A kind of variable that is a user's own."""


class Assorted(nnx.Module):
    """Of variables that mostly have no counterpart in PyTorch."""

    def __init__(self, rngs):
        self.einsum = nnx.Einsum("ta,abc->tbc", (2, 3, 4), (3, 4), rngs=rngs)
        self.batched = nnx.LinearGeneral(3, 4, batch_axis={0: 5}, rngs=rngs)
        self.stacked = nnx.vmap(lambda rngs: nnx.Linear(2, 3, rngs=rngs))(rngs.split(4))
        self.selections = nnx.vmap(
            lambda rngs: ChannelSelectionConv(2, 3, (1, 3), norm=True, rngs=rngs)
        )(rngs.split(2))
        self.adapted = nnx.LoRALinear(2, 3, lora_rank=1, rngs=rngs)
        self.spectral = nnx.SpectralNorm(nnx.Linear(2, 3, rngs=rngs), rngs=rngs)
        self.slope = nnx.PReLU()
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.scales = nnx.data([nnx.Param(jnp.ones(())), {"x": nnx.BatchStat(jnp.ones((0, 2)))}])
        self.codebook = Codebook(jnp.arange(3))
        self.spectrum = nnx.Param(jnp.ones(3, jnp.complex64))
        self.used = nnx.BatchStat(jnp.ones(3, bool))
        self.half = nnx.Param(jnp.ones(3, jnp.bfloat16))
        self.num_batches_tracked = nnx.Param(jnp.ones(2))


def assorted(seed):
    """One with variables that NumPy draws, and their values in Flax's layout."""
    module = nnx.eval_shape(lambda: Assorted(nnx.Rngs(0)))
    rng, kept = np.random.default_rng(seed), nnx.Not(nnx.RngState)
    state = jax.tree.map(
        lambda leaf: jax.device_put(rng.integers(0, 99, leaf.shape).astype(leaf.dtype)),
        nnx.state(module, kept),
    )
    nnx.update(module, state)
    return module, jax.tree.map(np.array, nnx.to_pure_dict(state))


def test_everything_else_as_it_is(tmp_path):
    (module, expected), (other, different) = assorted(0), assorted(1)
    names = {"selections": "sums", "codebook": "codes"}
    arrays = to_numpy(module, names=names)
    assert len(arrays) == len(jax.tree.leaves(expected))
    for name, array in {
        "einsum.kernel": expected["einsum"]["kernel"],
        "batched.bias": expected["batched"]["bias"],
        "stacked.kernel": expected["stacked"]["kernel"],
        "sums.pointwise": expected["selections"]["pointwise"],
        "adapted.weight": expected["adapted"]["kernel"].T,
        "adapted.lora.lora_a": expected["adapted"]["lora"]["lora_a"],
        "slope.weight": expected["slope"]["negative_slope"].reshape(1),
        "scales.1.x": expected["scales"][1]["x"],
        "codes": expected["codebook"],
    }.items():
        chex.assert_trees_all_equal(arrays[name], array)
    save_safetensors(module, tmp_path / "all.safetensors", names=names)
    load_safetensors(other, tmp_path / "all.safetensors", names=names)
    kept = nnx.state(other, nnx.Not(nnx.RngState))
    chex.assert_trees_all_equal(nnx.to_pure_dict(kept), expected, strict=True)
    from_torch(module, to_torch(assorted(1)[0]))
    kept = nnx.state(module, nnx.Not(nnx.RngState))
    chex.assert_trees_all_equal(nnx.to_pure_dict(kept), different, strict=True)


def test_a_variable_of_no_numbers():
    module = two_layers()
    module.layers[0].shape = nnx.Variable((2, 2))
    with pytest.raises(ValueError, match="layers.0.shape holds no array of numbers"):
        to_numpy(module)


@pytest.mark.parametrize("name", ["resnet50", "cifar_wrn16_1"])
def test_names_of_a_network_s_layers_are_different(name):
    network = uninitialised(dataclasses.replace(PRESETS[name], blocks=(1, 1), width=8))
    count = len(jax.tree.leaves(nnx.state(network, (nnx.Param, nnx.BatchStat))))
    assert len(to_numpy(network)) == len(to_numpy(network, names="bsconv")) == count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_and_tensors_hold_every_bit(tmp_path, dtype):
    options = {"param_dtype": jnp.dtype(dtype), "rngs": nnx.Rngs(0)}
    layer = ChannelSelectionConv(5, 4, (3, 3), rank=2, **options)
    expected = to_numpy(layer)
    tensors = to_torch(layer)
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    save_safetensors(layer, tmp_path / "layer.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "layer.safetensors")
    other = ChannelSelectionConv(5, 4, (3, 3), rank=2, **options | {"rngs": nnx.Rngs(1)})
    assert stored.keys() == tensors.keys() == expected.keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())
    load_safetensors(other, tmp_path / "layer.safetensors")
    chex.assert_trees_all_equal(to_numpy(other), expected)
    # The file of PyTorch's own writer, and tensors that are not contiguous or have a gradient.
    views = {
        name: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
        for name, tensor in tensors.items()
    }
    assert not views["fc.weight"].is_contiguous()
    from_torch(layer, {name: torch.nn.Parameter(tensor) for name, tensor in views.items()})
    chex.assert_trees_all_equal(to_numpy(layer), expected)
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors")
    load_safetensors(layer, tmp_path / "theirs.safetensors")
    chex.assert_trees_all_equal(to_numpy(layer), expected)


def test_a_file_that_is_none(tmp_path):
    layer = SubKernelConv(2, 3, (1, 1), rngs=nnx.Rngs(0))
    (tmp_path / "weights.safetensors").write_text("wrong")
    with pytest.raises(ValueError, match="path='.*weights.safetensors' is not a safetensors file"):
        load_safetensors(layer, tmp_path / "weights.safetensors")
    with pytest.raises(FileNotFoundError):
        load_safetensors(layer, tmp_path / "missing.safetensors")


def two_layers():
    return nnx.Sequential(*(nnx.Linear(2, 2, rngs=nnx.Rngs(seed)) for seed in (0, 1)))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"layers.1": "layers.0"}, "layers.0 and layers.1 would both have 'layers.0.w"),
        ({"layers.1": ""}, r"names\['layers.1'\]='' must be a name"),
        ({"layers.1.kernel": "x"}, "names: 'layers.1.kernel' is no layer of the module"),
    ],
)
def test_no_layer_is_left_out_or_loaded_twice(names, message):
    with pytest.raises(ValueError, match=message):
        to_numpy(two_layers(), names=names)


def test_tied_layers_have_equal_arrays():
    module = two_layers()
    module.layers[1].kernel = module.layers[0].kernel
    before, arrays = to_numpy(module), to_numpy(module)
    arrays["layers.1.weight"] = arrays["layers.1.weight"] + 1
    with pytest.raises(ValueError, match="layers.1.weight has other values than layers.0.weight"):
        from_torch(module, arrays)
    chex.assert_trees_all_equal(to_numpy(module), before)
    from_torch(module, before)


@pytest.mark.parametrize("state_dict", [None, {3: np.ones(2)}])
def test_a_state_dict_is_a_mapping_from_names(state_dict):
    with pytest.raises(ValueError, match="must be a mapping from names to arrays"):
        from_torch(two_layers(), state_dict)


def test_a_file_of_a_dtype_that_numpy_lacks(tmp_path):
    path = tmp_path / "weights.safetensors"
    tensors = {"weight": torch.ones(2, 2).to(torch.float8_e5m2), "bias": torch.ones(2)}
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(ValueError, match="holds a dtype that NumPy lacks"):
        load_safetensors(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), path)


@pytest.mark.parametrize(
    ("argument", "value"), [("names", "keras"), ("parts", "linear"), ("names", {"convs": "x"})]
)
def test_wrong_names_and_parts(argument, value):
    layer = SubKernelConv(2, 3, (1, 1), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=f"{argument}"):
        to_numpy(layer, **{argument: value})
