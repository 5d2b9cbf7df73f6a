"""The two layers: against PyTorch, against each other, and at the edges of their arguments."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from chansel_jax import ChannelSelectionConv, SubKernelConv, resnet14
from chansel_jax.conv import window_of
from experiments.pytorch.networks import WeightedSumConv2d

LAYERS = [SubKernelConv, ChannelSelectionConv]

# Kernel size, strides, padding, dilation, bias and rank: every value of one meets most values of
# the others, in images of 13 × 10 with 4 channels.
GRID = [
    ((1, 1), 1, 0, 1, True, 1),
    ((1, 1), 2, 0, 1, False, 1),
    ((1, 1), (3, 1), 1, 1, True, 1),
    ((3, 3), 1, 1, 1, False, 1),
    ((3, 3), 2, 1, 1, True, 2),
    ((3, 3), (1, 2), (0, 2), (1, 2), True, 4),
    ((3, 3), (3, 1), ((0, 1), (2, 0)), 2, False, 3),
    ((3, 3), 2, "SAME", 1, True, 1),
    ((2, 5), 1, 0, 1, True, 3),
    ((2, 5), 2, (1, 2), 2, False, 1),
    ((2, 5), (1, 2), ((1, 0), (3, 2)), (1, 2), True, 1),
    ((2, 5), (3, 1), "VALID", (1, 2), False, 2),
    ((5, 2), 2, ((2, 1), (0, 0)), 1, True, 4),
    ((7, 7), 1, 3, 1, True, 2),
    ((7, 7), 2, 3, 1, False, 1),
    ((7, 7), (3, 1), "SAME", (1, 2), True, 1),
]


def normal(shape):
    return jax.device_put(np.random.default_rng(0).standard_normal(shape, np.float32))


def relative_error(actual, expected):
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def torch_twin(layer):
    """A `torch.nn` layer without padding, and the parameters of `layer` it has been given.

    The parameters come as `{name in layer: (parameter, function from its layout to Flax's)}`.
    """
    window = {
        "stride": layer.strides,
        "dilation": layer.kernel_dilation,
        "bias": layer.bias is not None,
    }
    sizes = (layer.in_features, layer.out_features, layer.kernel_size)
    if isinstance(layer, SubKernelConv):
        twin = conv = torch.nn.Conv2d(*sizes, **window)
        parameters = {"kernel": (conv.weight, lambda w: w.transpose(2, 3, 1, 0))}
    else:
        twin = WeightedSumConv2d(*sizes, **window, rank=layer.rank)
        conv = twin.conv2d
        parameters = {
            "pointwise": (twin.fc.weight, lambda w: w.T),
            "depthwise": (conv.weight, lambda w: w.transpose(2, 3, 1, 0)),
        }
    if layer.bias is not None:
        parameters["bias"] = (conv.bias, lambda b: b)
    for name, (parameter, to_flax) in parameters.items():
        values = np.array(to_flax(parameter.detach().numpy()))
        getattr(layer, name)[...] = jax.device_put(values)
    return twin, parameters


def torch_forward(twin, layer, x):
    """`twin` of the NHWC tensor `x`, padded as `layer` pads."""
    rows, columns = window_of(layer).padding_pairs(tuple(x.shape[1:3]), layer.kernel_size)
    padded = torch.nn.functional.pad(x.permute(0, 3, 1, 2), (*columns, *rows))
    return twin(padded).permute(0, 2, 3, 1)


@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize(
    ("kernel_size", "strides", "padding", "dilation", "use_bias", "rank"), GRID
)
def test_outputs_and_gradients_are_those_of_torch(
    kernel_size, strides, padding, dilation, use_bias, rank, layer_type
):
    """In one lowering, which those in `tests/ops` are held against."""
    torch.manual_seed(0)
    options = {
        "strides": strides,
        "padding": padding,
        "kernel_dilation": dilation,
        "use_bias": use_bias,
        "kernel_init": nnx.initializers.zeros,  # `torch_twin` brings its own values
        "rngs": nnx.Rngs(0),
    }
    if layer_type is SubKernelConv:
        layer = SubKernelConv(4, 6, kernel_size, lowering="lax", **options)
    else:
        layer = ChannelSelectionConv(4, 6, kernel_size, rank=rank, lowering="grouped", **options)
    twin, parameters = torch_twin(layer)
    x = torch.randn(2, 13, 10, 4, requires_grad=True)
    expected = torch_forward(twin, layer, x)
    cotangent = torch.randn_like(expected)
    expected.backward(cotangent)

    graphdef, state = nnx.split(layer)

    @jax.jit
    def output_and_gradients(state, x, cotangent):
        y, pull_back = jax.vjp(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
        return y, *pull_back(cotangent)

    actual, state_grad, x_grad = output_and_gradients(state, x.detach().numpy(), cotangent.numpy())
    assert relative_error(actual, expected.detach()) < 1e-5
    assert relative_error(x_grad, x.grad) < 1e-5
    assert set(state_grad) == set(parameters)
    for name, (parameter, to_flax) in parameters.items():
        assert relative_error(state_grad[name][...], to_flax(parameter.grad.numpy())) < 1e-5, name


@pytest.mark.parametrize("train", [True, False])
def test_norm_between_the_parts_is_that_of_torch(train):
    torch.manual_seed(0)
    layer = ChannelSelectionConv(
        4, 6, (3, 3), strides=2, padding=1, rank=2, norm=True, rngs=nnx.Rngs(0)
    )
    twin = WeightedSumConv2d(4, 6, 3, stride=2, padding=1, rank=2, norm=True)
    torch.nn.init.normal_(twin.bn.weight)
    torch.nn.init.normal_(twin.bn.bias)
    twin.bn.running_mean.normal_()
    twin.bn.running_var.uniform_(0.5, 2)
    for variable, value in [
        (layer.pointwise, twin.fc.weight.T),
        (layer.depthwise, twin.conv2d.weight.permute(2, 3, 1, 0)),
        (layer.bias, twin.conv2d.bias),
        (layer.norm.scale, twin.bn.weight),
        (layer.norm.bias, twin.bn.bias),
        (layer.norm.mean, twin.bn.running_mean),
        (layer.norm.var, twin.bn.running_var),
    ]:
        variable[...] = jnp.array(value.detach().numpy())
    twin.train(train)
    layer.train() if train else layer.eval()
    x = torch.randn(3, 4, 9, 7)
    mean, var = twin.bn.running_mean.clone(), twin.bn.running_var.clone()
    expected = twin(x).permute(0, 2, 3, 1)
    actual = layer(x.permute(0, 2, 3, 1).numpy())
    assert relative_error(actual, expected.detach()) < 1e-5
    # PyTorch's running variance takes that of a sample, divided by n - 1; Flax divides by n.
    n = 3 * 9 * 7
    biased = 0.9 * var + (twin.bn.running_var - 0.9 * var) * (n - 1) / n if train else var
    assert relative_error(layer.norm.var[...], biased) < 1e-5
    assert relative_error(layer.norm.mean[...], twin.bn.running_mean) < 1e-5
    assert bool((layer.norm.mean[...] != mean.numpy()).any()) is train


def test_by_hand():
    # Two pixels with two channels, one output: the weighted sums are 1·1 + 2·10 = 21 and
    # 1·3 + 2·20 = 43, the kernel makes 5·21 - 1·43 = 62 of them, the bias 62.5.
    x = jnp.array([[[1.0, 10.0], [3.0, 20.0]]])
    options = {"padding": "VALID", "lowering": "grouped", "rngs": nnx.Rngs(0)}
    layer = ChannelSelectionConv(2, 1, (1, 2), **options)
    layer.pointwise[...] = jnp.array([[1.0], [2.0]])
    layer.depthwise[...] = jnp.array([5.0, -1.0]).reshape(1, 2, 1, 1)
    layer.bias[...] = jnp.array([0.5])
    np.testing.assert_allclose(layer(x), [[[62.5]]])
    expected = jnp.array([[5.0, -1.0], [10.0, -2.0]]).T.reshape(1, 2, 2, 1)
    np.testing.assert_allclose(layer.composed_kernel(), expected)

    # Rank 2 adds a second selection, 1·10 = 10 and 1·20 = 20, and its kernel: 62.5 + 0·10 + 3·20.
    layer = ChannelSelectionConv(2, 1, (1, 2), rank=2, **options)
    layer.pointwise[...] = jnp.array([[1.0, 0.0], [2.0, 1.0]])
    layer.depthwise[...] = jnp.array([[5.0, 0.0], [-1.0, 3.0]]).reshape(1, 2, 2, 1)
    layer.bias[...] = jnp.array([0.5])
    np.testing.assert_allclose(layer(x), [[[122.5]]])


def test_parameters_and_their_shapes():
    def shapes(layer_type, kernel_size, **options):
        layer = nnx.eval_shape(lambda: layer_type(4, 6, kernel_size, **options, rngs=nnx.Rngs(0)))
        return {name: v.shape for name, v in nnx.to_pure_dict(nnx.state(layer)).items()}

    assert shapes(SubKernelConv, (2, 5)) == {"kernel": (2, 5, 4, 6), "bias": (6,)}
    assert shapes(SubKernelConv, (3, 3), use_bias=False) == {"kernel": (3, 3, 4, 6)}
    assert shapes(ChannelSelectionConv, (2, 5), rank=3) == {
        "pointwise": (4, 18),
        "depthwise": (2, 5, 3, 6),
        "bias": (6,),
    }
    assert shapes(ChannelSelectionConv, (3, 3), use_bias=False) == {
        "pointwise": (4, 6),
        "depthwise": (3, 3, 1, 6),
    }
    assert shapes(SubKernelConv, 3, feature_group_count=2) == {"kernel": (3, 2, 6), "bias": (6,)}
    assert shapes(ChannelSelectionConv, (2, 1, 3), rank=2, feature_group_count=2) == {
        "pointwise": (2, 12),
        "depthwise": (2, 1, 3, 2, 6),
        "bias": (6,),
    }


def test_a_normalised_layer_has_no_composed_kernel():
    layer = ChannelSelectionConv(4, 6, (3, 3), norm=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="norm=True"):
        layer.composed_kernel()


@pytest.mark.parametrize(("in_channels", "kernel_size"), [(3, (3, 3)), (9, (2, 2))])
def test_full_rank_expresses_every_dense_kernel(in_channels, kernel_size):
    elements = kernel_size[0] * kernel_size[1]
    rank = min(in_channels, elements)
    dense = SubKernelConv(in_channels, 5, kernel_size, use_bias=False, rngs=nnx.Rngs(0))
    layer = ChannelSelectionConv(
        in_channels,
        5,
        kernel_size,
        rank=rank,
        use_bias=False,
        kernel_init=nnx.initializers.zeros,
        rngs=nnx.Rngs(1),
    )
    # Every filter, as a matrix of channels × window, is a sum of `rank` outer products.
    filters = np.asarray(dense.kernel[...]).reshape(elements, in_channels, 5).transpose(2, 1, 0)
    u, s, vh = np.linalg.svd(filters, full_matrices=False)
    layer.pointwise[...] = jnp.asarray((u * s[:, None]).transpose(1, 0, 2).reshape(in_channels, -1))
    layer.depthwise[...] = jnp.asarray(vh.transpose(2, 1, 0).reshape(*kernel_size, rank, 5))
    x = normal((2, 6, 7, in_channels))
    assert relative_error(layer.composed_kernel(), dense.kernel[...]) < 1e-5
    assert relative_error(layer(x), dense(x)) < 1e-5


@pytest.mark.parametrize(
    ("in_channels", "kernel_size", "rank"),
    [(1, (3, 3), 1), (32, (1, 1), 1), (8, (2, 5), 1), (16, (3, 3), 9)],
)
def test_initial_variance_is_that_of_lecun(in_channels, kernel_size, rank):
    out_channels = 2**12
    layer = ChannelSelectionConv(
        in_channels, out_channels, kernel_size, rank=rank, rngs=nnx.Rngs(0)
    )
    kernel = np.asarray(layer.composed_kernel(), np.float64)
    fan_in = kernel[..., 0].size
    # The elements of one filter depend on each other, filters do not. A filter's mean square, for
    # normal factors, has the relative variance 2/C_in + 2/K + 4/(C_in·K), less with a higher rank.
    elements = fan_in // in_channels
    spread = (2 / in_channels + 2 / elements + 4 / fan_in) / out_channels
    assert np.mean(kernel**2) == pytest.approx(1 / fan_in, rel=5 * spread**0.5)
    dense = SubKernelConv(in_channels, out_channels, kernel_size, rngs=nnx.Rngs(0))
    assert np.mean(dense.kernel[...] ** 2) == pytest.approx(
        1 / fan_in, rel=5 * (2 / kernel.size) ** 0.5
    )


def test_initialisers_are_honoured():
    def constant(value):
        return nnx.initializers.constant(value)

    rngs = nnx.Rngs(0)
    layer = ChannelSelectionConv(
        4, 6, (3, 3), kernel_init=constant(2.0), depthwise_init=constant(3.0), rngs=rngs
    )
    assert (layer.pointwise[...] == 2).all() and (layer.depthwise[...] == 3).all()
    layer = ChannelSelectionConv(
        4, 6, (3, 3), pointwise_init=constant(4.0), bias_init=constant(5.0), rngs=rngs
    )
    assert (layer.pointwise[...] == 4).all() and (layer.bias[...] == 5).all()
    layer = SubKernelConv(
        4, 6, (3, 3), kernel_init=constant(6.0), bias_init=constant(7.0), rngs=rngs
    )
    assert (layer.kernel[...] == 6).all() and (layer.bias[...] == 7).all()


@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
def test_any_batch_axes(layer_type, batch):
    layer = layer_type(4, 6, (3, 3), strides=2, rngs=nnx.Rngs(0))
    x = normal((*batch, 9, 7, 4))
    y = layer(x)
    assert y.shape == (*batch, 5, 4, 6)
    for index in np.ndindex(batch):
        np.testing.assert_allclose(y[index], layer(x[index]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer_type", LAYERS)
def test_dtypes(layer_type):
    x = jnp.arange(5 * 5 * 4, dtype=jnp.uint8).reshape(1, 5, 5, 4)
    layer = layer_type(4, 6, (3, 3), rngs=nnx.Rngs(0))
    assert layer(x).dtype == jnp.float32
    np.testing.assert_array_equal(layer(x), layer(x.astype(jnp.float32)))
    half = layer_type(4, 6, (3, 3), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert half(x).dtype == jnp.bfloat16
    assert relative_error(half(x).astype(jnp.float32), layer(x)) < 0.02
    half = layer_type(4, 6, (3, 3), param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(nnx.state(half)))
    assert half(x).dtype == jnp.bfloat16
    assert half(x.astype(jnp.float32)).dtype == jnp.float32


@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("in_features", 0),
        ("in_features", 2.0),
        ("out_features", -1),
        ("kernel_size", 0),
        ("kernel_size", ()),
        ("kernel_size", (3, 0)),
        ("kernel_size", (3, 3.0)),
        ("kernel_size", None),
        ("strides", 0),
        ("strides", (1, -2)),
        ("strides", (1,)),
        ("padding", "SOME"),
        ("padding", "CAUSAL"),
        ("padding", ((1, 1),)),
        ("padding", ((1, 1), (1, 0.5))),
        ("input_dilation", 0),
        ("feature_group_count", 0),
        ("feature_group_count", 3),
        ("kernel_dilation", 0),
        ("kernel_dilation", 1.5),
    ],
)
def test_wrong_argument(layer_type, name, value):
    arguments = {"in_features": 4, "out_features": 6, "kernel_size": (3, 3), name: value}
    with pytest.raises(ValueError) as error:
        layer_type(**arguments, rngs=nnx.Rngs(0))
    assert f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "options"),
    [
        ("rank", 0, {}),
        ("rank", 1.0, {}),
        ("rank", 5, {}),
        ("rank", 2, {"kernel_size": 1}),
        ("rank", 3, {"kernel_size": (1, 2)}),
        ("lowering", "fused", {}),
        ("lowering", "composed", {"norm": True}),
        ("norm", True, {"lowering": "composed"}),
        ("lowering", "native", {"norm": True}),
        ("rank", 3, {"feature_group_count": 2}),
        ("lowering", "shifted", {"padding": -1}),
        ("conv_general_dilated", print, {}),
    ],
)
def test_wrong_argument_of_channel_selection(name, value, options):
    arguments = {"in_features": 4, "out_features": 6, "kernel_size": (3, 3), **options, name: value}
    with pytest.raises(ValueError) as error:
        ChannelSelectionConv(**arguments, rngs=nnx.Rngs(0))
    assert f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize("layer_type", LAYERS)
def test_images_that_do_not_fit(layer_type):
    layer = layer_type(4, 6, (3, 3), padding="VALID", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"\(1, 5, 5, 3\).*in_features=4"):
        layer(jnp.zeros((1, 5, 5, 3)))
    with pytest.raises(ValueError, match=r"\(5, 4\).*in_features=4"):
        layer(jnp.zeros((5, 4)))
    with pytest.raises(ValueError, match=r"\(H, W\)=\(2, 5\)"):
        layer(jnp.zeros((1, 2, 5, 4)))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("layer_type", LAYERS)
def test_images_of_no_pixels(layer_type, size):
    for lowering in layer_type.LOWERINGS:
        layer = layer_type(4, 6, (3, 3), padding=2, lowering=lowering, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match=re.escape(f"(H, W)={size} has no pixels")):
            layer(jnp.zeros((1, *size, 4)))


def test_what_is_no_array_of_numbers():
    layers = [layer_type(4, 6, (3, 3), rngs=nnx.Rngs(0)) for layer_type in LAYERS]
    layers.append(resnet14(blocks=(1,), width=4, rngs=nnx.Rngs(0)))
    for x, told in (
        ([[[1.0] * 4] * 5] * 5, "inputs=[[["),
        ((), "inputs=(), of type tuple,"),
        (None, "inputs=None, of type NoneType,"),
        ("dog.png", "inputs='dog.png', of type str,"),
        (np.full((5, 5, 4), "1"), "inputs of <U1, of type ndarray,"),
        (torch.zeros(5, 5, 4), "inputs of torch.float32, of type Tensor,"),
    ):
        for layer in layers:
            with pytest.raises(
                ValueError, match=re.escape(told) + ".* must be an array of numbers"
            ):
                layer(x)
