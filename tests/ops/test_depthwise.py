"""The depthwise part against numbers worked out by hand; `test_shifted.py` has many windows."""

import jax.numpy as jnp
import numpy as np
import pytest

from chansel_jax.ops.depthwise import depthwise_conv

LOWERINGS = ("grouped", "shifted")


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_by_hand(lowering):
    # Two output channels of rank 2: channels 0 and 1 of x make the first, 2 and 3 the second.
    x = jnp.array([[[1.0, 10.0, 2.0, 0.0], [3.0, 20.0, 5.0, 1.0]]])[None]
    kernel = jnp.array([[[1.0, -1.0], [0.1, 4.0]], [[2.0, 0.0], [0.5, 3.0]]])[None]
    y = depthwise_conv(x, kernel, padding="VALID", lowering=lowering)
    # 1·1 + 0.1·10 + 2·3 + 0.5·20 = 18 and -1·2 + 4·0 + 0·5 + 3·1 = 1
    np.testing.assert_allclose(y, [[[[18.0, 1.0]]]], rtol=1e-6)


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


@pytest.mark.parametrize(("name", "value"), [("strides", 0), ("padding", 0.5), ("dilation", (1,))])
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
