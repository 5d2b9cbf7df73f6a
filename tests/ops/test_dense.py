"""The dense convolution's lowerings against PyTorch in float64, and by hand.

`tests/test_conv.py` holds "lax" against PyTorch in many windows, this file "native".
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from layers import ANY_LAYER, LAYERS, NAMES, WINDOW, assert_close, in_torch, normal

from chansel_jax.ops import native
from chansel_jax.ops.dense import LOWERINGS, dense_conv
from chansel_jax.ops.lowerings import runnable
from chansel_jax.ops.window import Window

RUNNABLE = [name for name in runnable(LOWERINGS) if name != "auto"]
NATIVE = [name for name in RUNNABLE if name == "native"]
TOLERANCES = {np.float64: 1e-13, jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


@functools.partial(jax.jit, static_argnames=("strides", "padding", "dilation", "lowering"))
def output_and_gradients(x, kernel, dy, **options):
    y, pull_back = jax.vjp(functools.partial(dense_conv, **options), x, kernel)
    return y, *pull_back(dy)


def arrays(size, kernel_size, channels, *, batch=2, dtype=jnp.float32, **window):
    """Random `x`, `kernel` and a gradient of the output."""
    return normal(
        (batch, *size, channels[0]),
        (*kernel_size, *channels),
        (batch, *Window.of(**window).output_size(size, kernel_size), channels[1]),
        dtype=dtype,
    )


def assert_like_torch(lowering, size, kernel_size, channels, dtype, **window):
    with jax.enable_x64(True):
        operands = arrays(size, kernel_size, channels, dtype=dtype, **window)
        actual = output_and_gradients(*operands, **window, lowering=lowering)
    assert all(a.dtype == dtype for a in actual)
    assert_close(actual, in_torch(*operands, **window), TOLERANCES[dtype])


@pytest.mark.parametrize("lowering", NATIVE)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(NAMES, LAYERS)
def test_native_like_torch(kernel_size, strides, padding, dilation, channels, dtype, lowering):
    window = {"strides": strides, "padding": padding, "dilation": dilation}
    assert_like_torch(lowering, (11, 13), kernel_size, channels, dtype, **window)


@pytest.mark.parametrize("lowering", NATIVE)
@hypothesis.settings(max_examples=20, derandomize=True, deadline=None, database=None)
@hypothesis.given(**ANY_LAYER, dtype=st.sampled_from(tuple(TOLERANCES)))
def test_native_like_torch_for_any_shape(lowering, size, kernel_size, channels, dtype, **window):
    try:
        Window.of(**window).output_size(size, kernel_size)
    except ValueError:
        hypothesis.reject()
    assert_like_torch(lowering, size, kernel_size, channels, dtype, **window)


@pytest.mark.parametrize("lowering", NATIVE)
@pytest.mark.parametrize(("strides", "dilation"), [((1, 1), (1, 1)), ((2, 3), (1, 2))])
def test_large_images_are_taken_in_parts(strides, dilation, lowering):
    """Images that do not fit into the cache."""
    window = {"strides": strides, "padding": ((2, 2), (2, 2)), "dilation": dilation}
    assert_like_torch(lowering, (140, 90), (5, 3), (20, 24), np.float64, **window)


@pytest.mark.parametrize("lowering", RUNNABLE)
def test_by_hand(lowering):
    # One row of three pixels of two channels, taps (1, 10) and (100, 1000) of one output.
    x = jnp.array([[1.0, 0.0], [2.0, 0.0], [3.0, 1.0]]).reshape(1, 1, 3, 2)
    kernel = jnp.array([1.0, 10.0, 100.0, 1000.0]).reshape(1, 2, 2, 1)
    y, pull_back = jax.vjp(
        functools.partial(dense_conv, padding="VALID", lowering=lowering), x, kernel
    )
    np.testing.assert_array_equal(y.reshape(2), [1 + 200, 2 + 300 + 1000])
    dx, dkernel = pull_back(jnp.array([1.0, 5.0]).reshape(1, 1, 2, 1))
    np.testing.assert_array_equal(dx.reshape(3, 2), [[1, 10], [105, 1050], [500, 5000]])
    np.testing.assert_array_equal(dkernel.reshape(4), [1 + 10, 0, 2 + 15, 5])


@pytest.mark.parametrize("lowering", NATIVE)
def test_vmap_checkpoint_scan_and_a_sharded_batch(lowering):
    operands = arrays((6, 5), (3, 3), (4, 3), batch=8, **WINDOW)
    x, kernel, dy = operands

    def loss(kernel, lowering, mapped):
        call = functools.partial(dense_conv, **WINDOW, lowering=lowering)

        def one(x):
            return jnp.mean(jnp.square(jax.checkpoint(call)(x, kernel)))

        xs = x.reshape(4, 2, *x.shape[1:])
        if mapped == "vmap":
            return jnp.sum(jax.vmap(one)(xs))
        return lax.scan(lambda total, x: (total + one(x), None), 0.0, xs)[0]

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=(1, 2))
    expected = gradient(kernel, "lax", "vmap")
    for mapped in ("vmap", "scan"):
        assert_close(gradient(kernel, lowering, mapped), expected, 1e-5)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    batch = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.device_put(x, batch), kernel, jax.device_put(dy, batch)
    assert_close(
        output_and_gradients(*sharded, **WINDOW, lowering=lowering),
        in_torch(*operands, **WINDOW),
        1e-5,
    )


@pytest.mark.parametrize("lowering", RUNNABLE)
@pytest.mark.parametrize(("batch", "size"), [(0, (6, 5)), (2, (0, 5)), (2, (6, 0))])
def test_empty_arrays(batch, size, lowering):
    window = {**WINDOW, "padding": ((2, 2), (2, 2))}
    operands = arrays(size, (3, 3), (4, 3), batch=batch, **window)
    y, dx, dkernel = output_and_gradients(*operands, **window, lowering=lowering)
    assert y.shape == operands[2].shape and dx.shape == operands[0].shape
    for a in (y, dkernel):
        np.testing.assert_array_equal(a, np.zeros(a.shape))


def test_auto_is_one_of_the_others():
    operands = arrays((6, 5), (3, 3), (4, 3), **WINDOW)
    actual = output_and_gradients(*operands, **WINDOW, lowering="auto")
    assert_close(actual, in_torch(*operands, **WINDOW), 1e-5)
    long_vectors = bool(NATIVE) and native.instruction_set() != "baseline"
    wanted = "chansel_dense" if long_vectors else "convolution"
    text = output_and_gradients.lower(*operands, **WINDOW, lowering="auto")
    assert wanted in text.as_text()


@pytest.mark.parametrize("lowering", NATIVE)
def test_a_gradient_that_nobody_asks_for_is_left_out(lowering):
    operands = arrays((6, 5), (3, 3), (4, 3), **WINDOW)

    def kernel_gradient(x, kernel, dy):
        call = functools.partial(dense_conv, **WINDOW, lowering=lowering)
        return jax.vjp(call, x, kernel)[1](dy)[1]

    compiled = jax.jit(kernel_gradient).lower(*operands).compile().as_text()
    assert "chansel_dense_kernel_gradient" in compiled
    assert "chansel_dense_data_gradient" not in compiled


def test_without_the_compiled_library(monkeypatch):
    monkeypatch.setattr(native, "_library", lambda: "no compiler")
    operands = arrays((6, 5), (3, 3), (4, 3), **WINDOW)
    dense_conv(*operands[:2], **WINDOW)
    with pytest.raises(ValueError, match="lowering='native'.*compiler"):
        dense_conv(*operands[:2], **WINDOW, lowering="native")


@pytest.mark.parametrize("lowering", RUNNABLE)
@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((6, 5, 4), (3, 3, 4, 2)), "(6, 5, 4)"),
        (((2, 6, 5, 4), (3, 3, 5, 2)), "(3, 3, 5, 2)"),
        (((2, 6, 5, 4), (3, 4, 2)), "(3, 4, 2)"),
        (((2, 6, 5, 4), (3, 3, 4, 0)), "at least 1"),
        (((2, 6, 5, 4), (0, 3, 4, 2)), "at least 1"),
        (((2, 2, 5, 4), (3, 3, 4, 2)), "(H, W)=(2, 5)"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message, lowering):
    with pytest.raises(ValueError) as error:
        operands = [jax.device_put(np.zeros(shape, np.float32)) for shape in shapes]
        dense_conv(*operands, padding="VALID", lowering=lowering)
    assert message in str(error.value)


def test_wrong_lowerings_and_dtypes():
    x, kernel = jnp.zeros((2, 6, 5, 4)), jnp.zeros((3, 3, 4, 2))
    with pytest.raises(ValueError, match="lowering='shifted' must be one of 'auto', 'lax'"):
        dense_conv(x, kernel, lowering="shifted")
    with pytest.raises(TypeError, match="float32 and kernel of dtype bfloat16"):
        dense_conv(x, kernel.astype(jnp.bfloat16))
    for lowering in NATIVE:
        with pytest.raises(ValueError, match="float16"):
            dense_conv(x.astype(jnp.float16), kernel.astype(jnp.float16), lowering=lowering)
