"""State dicts of PyTorch in and out: names, layouts, and what does not fit."""

import functools

import chex
import jax
import numpy as np
import pytest
import torch
from flax import nnx

from chansel_jax import ChannelSelectionConv, SubKernelConv, resnet14, resnet18
from chansel_jax.networks.resnet import CONVS
from chansel_jax.torch_weights import from_torch, to_torch
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
    arrays = to_torch(network)
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
    assert {name: array.shape for name, array in to_torch(network).items()} == expected

    from_torch(network, before)
    chex.assert_trees_all_equal(
        to_torch(network), {name: before[name].numpy() for name in expected}
    )
    values = numbered(network)
    twin.load_state_dict({name: torch.from_numpy(array) for name, array in values.items()})
    chex.assert_trees_all_equal({n: twin.state_dict()[n].numpy() for n in expected}, values)


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
    names = to_torch(small(resnet18, SubKernelConv)).keys()
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
        names = {n.removeprefix(prefix) for n in to_torch(network) if n.startswith(prefix)}
        assert names == {n for n in twin if "batches" not in n}
    values = numbered(network)
    from_torch(network, values)
    chex.assert_trees_all_equal(to_torch(network), values)


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
    chex.assert_trees_all_equal(to_torch(network), values)


def test_memory_is_not_shared():
    network = small()
    twin = torch_twin("chansel", network.config)
    from_torch(network, twin.state_dict())
    before = variables(network)
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.add_(1)
    chex.assert_trees_all_equal(variables(network), before)
    for array in to_torch(network).values():
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


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.net."])
def test_what_all_names_have_in_front(prefix):
    network = small()
    values = numbered(network)
    given = {prefix + name: value for name, value in values.items()}
    from_torch(network, given | {f"{prefix}bn1.num_batches_tracked": np.array(3)})
    chex.assert_trees_all_equal(to_torch(network), values)

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
        np.testing.assert_array_equal(to_torch(layer)["weight"], expected)


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


def test_a_layer_without_a_counterpart():
    network = nnx.eval_shape(lambda: resnet14(nnx.Conv, width=4, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"layer\d\.\d\.conv\d is a Conv,"):
        to_torch(network)
    with pytest.raises(ValueError, match=r"layer\d\.\d\.conv\d is a Conv,"):
        from_torch(network, {})
