"""The depthwise part against numbers worked out by hand and against a loop over windows."""

import jax.numpy as jnp
import numpy as np
import pytest

from chansel_jax.ops.depthwise import depthwise_conv
from chansel_jax.ops.window import padding_pairs

LOWERINGS = ("grouped", "shifted")


def convolved_by_loops(x, kernel, strides, pads, dilation):
    """What `depthwise_conv` defines, one output element after the other, in float64."""
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *pads, (0, 0)))
    n, height, width, _ = x.shape
    k_h, k_w, rank, out_channels = kernel.shape
    extent_h, extent_w = (k_h - 1) * dilation[0] + 1, (k_w - 1) * dilation[1] + 1
    rows = range(0, height - extent_h + 1, strides[0])
    columns = range(0, width - extent_w + 1, strides[1])
    y = np.zeros((n, len(rows), len(columns), out_channels))
    for i, top in enumerate(rows):
        for j, left in enumerate(columns):
            window = x[:, top : top + extent_h : dilation[0], left : left + extent_w : dilation[1]]
            grouped = window.reshape(n, k_h, k_w, out_channels, rank)
            y[:, i, j] = np.einsum("nhwor,hwro->no", grouped, np.asarray(kernel, np.float64))
    return y


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_by_hand(lowering):
    # Two output channels of rank 2: channels 0 and 1 of x make the first, 2 and 3 the second.
    x = jnp.array([[[1.0, 10.0, 2.0, 0.0], [3.0, 20.0, 5.0, 1.0]]])[None]
    kernel = jnp.array([[[1.0, -1.0], [0.1, 4.0]], [[2.0, 0.0], [0.5, 3.0]]])[None]
    y = depthwise_conv(x, kernel, padding="VALID", lowering=lowering)
    # 1·1 + 0.1·10 + 2·3 + 0.5·20 = 18 and -1·2 + 4·0 + 0·5 + 3·1 = 1
    np.testing.assert_allclose(y, [[[[18.0, 1.0]]]], rtol=1e-6)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize(
    ("kernel_size", "strides", "padding", "dilation", "rank"),
    [
        ((3, 3), (1, 1), "SAME", (1, 1), 1),
        ((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), 2),
        ((1, 1), (2, 1), "VALID", (1, 1), 1),
        ((2, 5), (1, 2), ((0, 3), (2, 1)), (1, 1), 3),
        ((3, 2), (3, 1), "SAME", (2, 1), 2),
        ((2, 3), (1, 1), ((4, 0), (0, 5)), (1, 3), 1),
    ],
)
def test_against_loops(kernel_size, strides, padding, dilation, rank, lowering):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 9, 8, 3 * rank), np.float32)
    kernel = rng.standard_normal((*kernel_size, rank, 3), np.float32)
    y = depthwise_conv(
        x, kernel, strides=strides, padding=padding, dilation=dilation, lowering=lowering
    )
    pads = padding_pairs(padding, (9, 8), kernel_size, strides, dilation)
    expected = convolved_by_loops(x, kernel, strides, pads, dilation)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_keeps_bfloat16(lowering):
    x, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 1, 2), jnp.bfloat16)
    y = depthwise_conv(x, kernel, padding="VALID", lowering=lowering)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, 9)


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape"),
    [
        ((1, 4, 4, 6), (3, 3, 1, 4)),
        ((4, 4, 4), (3, 3, 1, 4)),
        ((1, 4, 4, 4), (3, 3, 4)),
        ((1, 4, 4, 4), (0, 3, 1, 4)),
        ((1, 4, 4, 0), (3, 3, 1, 0)),
    ],
)
def test_shapes_that_do_not_fit(x_shape, kernel_shape):
    with pytest.raises(ValueError) as error:
        depthwise_conv(jnp.zeros(x_shape), jnp.zeros(kernel_shape))
    assert str(kernel_shape) in str(error.value)
    assert 0 in kernel_shape or str(x_shape) in str(error.value)


@pytest.mark.parametrize(("name", "value"), [("strides", 0), ("padding", -1), ("dilation", (1,))])
def test_wrong_window(name, value):
    with pytest.raises(ValueError) as error:
        depthwise_conv(jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 1, 2)), **{name: value})
    assert f"{name}={value!r}" in str(error.value)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_input_smaller_than_the_kernel(lowering):
    with pytest.raises(ValueError, match="smaller than a kernel"):
        depthwise_conv(
            jnp.zeros((1, 2, 4, 2)), jnp.zeros((3, 3, 1, 2)), padding="VALID", lowering=lowering
        )


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_dtypes_that_differ(lowering):
    with pytest.raises(TypeError, match="float32 .* bfloat16"):
        depthwise_conv(
            jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 1, 2), jnp.bfloat16), lowering=lowering
        )


def test_unknown_lowering():
    with pytest.raises(ValueError) as error:
        depthwise_conv(jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 1, 2)), lowering="fast")
    assert "lowering='fast'" in str(error.value)
    for choice in ("auto", *LOWERINGS):
        assert repr(choice) in str(error.value)


def test_auto_is_one_of_them():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 5, 5, 4), np.float32)
    kernel = rng.standard_normal((3, 3, 2, 2), np.float32)
    np.testing.assert_allclose(
        depthwise_conv(x, kernel), depthwise_conv(x, kernel, lowering="grouped"), rtol=1e-4
    )
