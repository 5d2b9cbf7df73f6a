"""Channel selection's lowerings against PyTorch in float64, and by hand.

`tests/test_conv.py` holds "grouped" against PyTorch in many windows, `test_shifted.py` and
`test_dense.py` what "shifted", "composed" and "composed_native" are made of, this file "native".
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
from chansel_jax.ops.lowerings import NATIVE, runnable
from chansel_jax.ops.selection import LOWERINGS, channel_selection
from chansel_jax.ops.window import Window

RUNNABLE = [name for name in runnable(LOWERINGS) if name != "auto"]
COMPILED = [name for name in RUNNABLE if name == "native"]
RANKS = (1, 1, 1, 1, 2, 1, 3, 1, 2, 1)  # of `LAYERS`
TOLERANCES = {np.float64: 1e-13, jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


@functools.partial(jax.jit, static_argnames=("strides", "padding", "dilation", "lowering"))
def output_and_gradients(x, pointwise, depthwise, dy, **options):
    function = functools.partial(channel_selection, **options)
    y, pull_back = jax.vjp(function, x, pointwise, depthwise)
    return y, *pull_back(dy)


def arrays(size, kernel_size, channels, *, rank=1, batch=2, dtype=jnp.float32, **window):
    """Random `x`, `pointwise`, `depthwise` and a gradient of the output."""
    in_channels, out_channels = channels
    return normal(
        (batch, *size, in_channels),
        (in_channels, out_channels * rank),
        (*kernel_size, rank, out_channels),
        (batch, *Window.of(**window).output_size(size, kernel_size), out_channels),
        dtype=dtype,
    )


def assert_like_torch(lowering, size, kernel_size, channels, rank, dtype, **window):
    with jax.enable_x64(True):
        operands = arrays(size, kernel_size, channels, rank=rank, dtype=dtype, **window)
        actual = output_and_gradients(*operands, **window, lowering=lowering)
    assert all(a.dtype == dtype for a in actual)
    assert_close(actual, in_torch(*operands, **window), TOLERANCES[dtype])


@pytest.mark.parametrize("lowering", COMPILED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    (*NAMES, "rank"), [(*layer, rank) for layer, rank in zip(LAYERS, RANKS, strict=True)]
)
def test_native_like_torch(
    kernel_size, strides, padding, dilation, channels, rank, dtype, lowering
):
    window = {"strides": strides, "padding": padding, "dilation": dilation}
    assert_like_torch(lowering, (11, 13), kernel_size, channels, rank, dtype, **window)


@pytest.mark.parametrize("lowering", COMPILED)
@hypothesis.settings(max_examples=20, derandomize=True, deadline=None, database=None)
@hypothesis.given(**ANY_LAYER, rank=st.integers(1, 3), dtype=st.sampled_from(tuple(TOLERANCES)))
def test_native_like_torch_for_any_shape(
    lowering, size, kernel_size, channels, rank, dtype, **window
):
    try:
        Window.of(**window).output_size(size, kernel_size)
    except ValueError:
        hypothesis.reject()
    assert_like_torch(lowering, size, kernel_size, channels, rank, dtype, **window)


@pytest.mark.parametrize("lowering", [name for name in RUNNABLE if name != "native"])
@pytest.mark.parametrize(("rank", "dtype"), [(1, jnp.float32), (3, jnp.bfloat16)])
def test_the_others_like_torch(rank, dtype, lowering):
    window = {"strides": (2, 1), "padding": ((1, 0), (0, 2)), "dilation": (1, 2)}
    assert_like_torch(lowering, (9, 8), (3, 2), (4, 3), rank, dtype, **window)


@pytest.mark.parametrize("lowering", RUNNABLE)
def test_by_hand(lowering):
    # One row of three pixels (a, b); the sums are a + 10·b = 1, 2 and 13, times the taps 10 and 1.
    x = jnp.array([[1.0, 0.0], [2.0, 0.0], [3.0, 1.0]]).reshape(1, 1, 3, 2)
    pointwise, depthwise = jnp.array([[1.0], [10.0]]), jnp.array([10.0, 1.0]).reshape(1, 2, 1, 1)
    call = functools.partial(channel_selection, padding="VALID", lowering=lowering)
    y, pull_back = jax.vjp(call, x, pointwise, depthwise)
    np.testing.assert_array_equal(y.reshape(2), [10 + 2, 20 + 13])
    dx, dpointwise, ddepthwise = pull_back(jnp.array([1.0, 5.0]).reshape(1, 1, 2, 1))
    # Gradients of the sums: 1·10, 1·1 + 5·10, 5·1.
    np.testing.assert_array_equal(dx.reshape(3, 2), [[10, 100], [51, 510], [5, 50]])
    np.testing.assert_array_equal(dpointwise.reshape(2), [10 * 1 + 51 * 2 + 5 * 3, 5 * 1])
    np.testing.assert_array_equal(ddepthwise.reshape(2), [1 * 1 + 5 * 2, 1 * 2 + 5 * 13])


@pytest.mark.parametrize("lowering", RUNNABLE)
def test_forward_mode_works_but_for_shifted(lowering):
    operands = arrays((6, 5), (3, 3), (4, 3), **WINDOW)[:3]
    function = functools.partial(channel_selection, **WINDOW, lowering=lowering)
    tangents = [0.5 * operand for operand in operands]
    if lowering == "shifted":
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(function, operands, tangents)
        return
    value, tangent = jax.jvp(function, operands, tangents)
    assert_close(tangent, 1.5 * value, 1e-5)  # trilinear: each of three factors half as large again


@pytest.mark.parametrize("lowering", COMPILED)
def test_vmap_checkpoint_and_scan(lowering):
    x, pointwise, depthwise, _ = arrays((6, 5), (3, 3), (4, 3), batch=4, rank=2, **WINDOW)
    xs = x.reshape(2, 2, *x.shape[1:])

    def loss(pointwise, depthwise, lowering, mapped):
        call = functools.partial(channel_selection, **WINDOW, lowering=lowering)

        def one(x):
            return jnp.mean(jnp.square(jax.checkpoint(call)(x, pointwise, depthwise)))

        if mapped == "vmap":
            return jnp.sum(jax.vmap(one)(xs))
        return lax.scan(lambda total, x: (total + one(x), None), 0.0, xs)[0]

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=(2, 3))
    expected = gradient(pointwise, depthwise, "grouped", "vmap")
    for mapped in ("vmap", "scan"):
        assert_close(gradient(pointwise, depthwise, lowering, mapped), expected, 1e-5)


@pytest.mark.parametrize("lowering", COMPILED)
def test_a_sharded_batch(lowering):
    x, pointwise, depthwise, dy = arrays((6, 5), (3, 3), (4, 3), batch=8, **WINDOW)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    batch = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.device_put(x, batch), pointwise, depthwise, jax.device_put(dy, batch)
    actual = output_and_gradients(*sharded, **WINDOW, lowering=lowering)
    assert_close(actual, in_torch(x, pointwise, depthwise, dy, **WINDOW), 1e-5)


def test_auto_is_one_of_the_others():
    operands = arrays((6, 5), (3, 3), (4, 3), **WINDOW)
    actual = output_and_gradients(*operands, **WINDOW, lowering="auto")
    assert_close(actual, in_torch(*operands, **WINDOW), 1e-5)


def test_auto_takes_arrays_of_numpy():
    operands = [np.asarray(a, np.float64) for a in arrays((6, 5), (3, 3), (4, 3), **WINDOW)]
    actual = channel_selection(*operands[:3], **WINDOW)
    assert actual.dtype == jnp.float32
    assert_close(actual, in_torch(*operands, **WINDOW)[0], 1e-5)


@pytest.mark.parametrize("lowering", ["grouped", "shifted", *COMPILED])
@pytest.mark.parametrize(("batch", "size"), [(0, (6, 5)), (2, (0, 5)), (2, (6, 0))])
def test_empty_arrays(batch, size, lowering):
    window = {**WINDOW, "padding": ((2, 2), (2, 2))}
    operands = arrays(size, (3, 3), (4, 3), batch=batch, **window)
    y, dx, dpointwise, ddepthwise = output_and_gradients(*operands, **window, lowering=lowering)
    assert y.shape == operands[3].shape and dx.shape == operands[0].shape
    for a in (y, dpointwise, ddepthwise):
        np.testing.assert_array_equal(a, np.zeros(a.shape))


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 8, 8, 0), (0, 3), (3, 3, 1, 3)),
        ((1, 8, 8, 4), (4, 0), (3, 3, 0, 5)),
        ((1, 8, 8, 4), (4, 0), (3, 3, 1, 0)),
        ((1, 8, 8, 4), (4, 3), (0, 3, 1, 3)),
    ],
)
def test_kernels_of_nothing_are_refused(shapes):
    with pytest.raises(ValueError, match="every size .* must be at least 1"):
        channel_selection(*map(np.ones, shapes))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 6, 5, 4), (4, 3), (3, 3, 1, 2)), "(4, 3)"),
        (((2, 6, 5, 4), (5, 3), (3, 3, 1, 3)), "(2, 6, 5, 4)"),
        (((6, 5, 4), (4, 3), (3, 3, 1, 3)), "(6, 5, 4)"),
        (((2, 6, 5, 4), (4, 3), (3, 3, 3)), "(3, 3, 3)"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError) as error:
        channel_selection(*map(jnp.zeros, shapes))
    assert message in str(error.value)


def test_a_wrong_lowering():
    with pytest.raises(ValueError, match="lowering='fused' must be one of 'auto', 'composed'"):
        channel_selection(*map(jnp.zeros, ((1, 6, 5, 4), (4, 3), (3, 3, 1, 3))), lowering="fused")


@pytest.mark.parametrize("lowering", RUNNABLE)
def test_an_input_smaller_than_the_kernel(lowering):
    with pytest.raises(ValueError, match=r"\(H, W\)=\(2, 5\)"):
        channel_selection(
            *map(jnp.zeros, ((1, 2, 5, 4), (4, 3), (3, 3, 1, 3))),
            padding="VALID",
            lowering=lowering,
        )


def test_without_the_compiled_library(monkeypatch):
    monkeypatch.setattr(native, "_library", lambda: "no compiler")
    operands = arrays((6, 5), (3, 3), (4, 3), **WINDOW)
    channel_selection(*operands[:3], **WINDOW)
    for lowering in NATIVE:
        with pytest.raises(ValueError, match=f"lowering='{lowering}'.*compiler"):
            channel_selection(*operands[:3], **WINDOW, lowering=lowering)
        assert lowering not in runnable(LOWERINGS)
