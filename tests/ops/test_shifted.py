"""The shifted lowering of the depthwise convolution against PyTorch in float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from layers import ANY_LAYER, WINDOW, assert_close, in_torch, normal

from chansel_jax.ops.depthwise import depthwise_conv
from chansel_jax.ops.window import Window, padding_spec, per_axis

shifted = functools.partial(depthwise_conv, lowering="shifted")
grouped = functools.partial(depthwise_conv, lowering="grouped")


@functools.partial(jax.jit, static_argnames=("strides", "padding", "dilation", "lowering"))
def output_and_gradients(x, kernel, dy, lowering="shifted", **window):
    conv = functools.partial(depthwise_conv, **window, lowering=lowering)
    y, pull_back = jax.vjp(conv, x, kernel)
    return y, *pull_back(dy)


def arrays(size, kernel_size, *, rank=1, channels=3, batch=2, dtype=jnp.float32, **window):
    """Random `x`, `kernel` and a gradient of the output."""
    return normal(
        (batch, *size, channels * rank),
        (*kernel_size, rank, channels),
        (batch, *Window.of(**window).output_size(size, kernel_size), channels),
        dtype=dtype,
    )


def assert_like_torch(size, kernel_size, *, rank, **window):
    operands = arrays(size, kernel_size, rank=rank, **window)
    actual = output_and_gradients(*operands, **window)
    assert_close(actual, in_torch(*operands, **window), 1e-5)


@pytest.mark.parametrize(
    ("kernel_size", "strides", "padding", "dilation", "rank"),
    [
        (1, 1, "SAME", 1, 1),
        (1, 3, ((2, 0), (1, 5)), 2, 2),
        (2, 2, "SAME", 1, 2),
        (2, (2, 1), ((3, 1), (0, 2)), 2, 1),
        (3, 1, "VALID", 1, 2),
        (3, 1, ((5, 6), (7, 4)), 1, 1),
        (3, 2, 1, 1, 1),
        (3, 2, ((0, 3), (4, 0)), 2, 2),
        (3, 3, "SAME", 1, 1),
        (3, (1, 4), 1, (1, 2), 2),
        ((1, 3), (2, 1), "VALID", 2, 1),
        (5, 2, "SAME", 1, 1),
        ((5, 2), (2, 1), 2, (1, 2), 1),
        (7, 2, 3, 1, 1),
    ],
)
def test_like_torch(kernel_size, strides, padding, dilation, rank):
    # 11 rows: more than the kernel gradient sums at once, and no multiple of what it does.
    assert_like_torch(
        (11, 9),
        per_axis("kernel_size", kernel_size),
        strides=per_axis("strides", strides),
        padding=padding_spec(padding),
        dilation=per_axis("dilation", dilation),
        rank=rank,
    )


SMALL = {"kernel_size": st.tuples(st.integers(1, 3), st.integers(1, 3)), "rank": st.integers(1, 2)}


@hypothesis.settings(max_examples=12, derandomize=True, deadline=None, database=None)
@hypothesis.given(**{name: ANY_LAYER[name] for name in ANY_LAYER if name != "channels"} | SMALL)
def test_any_window_like_torch(size, kernel_size, rank, **window):
    try:
        Window.of(**window).output_size(size, kernel_size)
    except ValueError:
        hypothesis.reject()
    assert_like_torch(size, kernel_size, rank=rank, **window)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float16, 5e-3)])
def test_sums_16_bits_in_float32(dtype, tolerance):
    operands = arrays((16, 8), (3, 3), rank=2, batch=8, dtype=dtype, **WINDOW)
    actual = output_and_gradients(*operands, **WINDOW)
    assert all(a.dtype == dtype for a in actual)
    expected = in_torch(*operands, **WINDOW)
    assert_close(actual, expected, tolerance)
    # No worse than rounding once: sums in 16 bits would be.
    rounded = [jnp.asarray(e, dtype) for e in expected]
    assert_close(actual, rounded, float(jnp.finfo(dtype).eps))


def test_gradients_by_hand():
    x, kernel = jnp.array([1.0, 2.0, 3.0]), jnp.array([10.0, 1.0])

    def weighted(x, kernel):  # y = (10·1 + 2, 10·2 + 3), weighted by 1 and 5
        y = shifted(x.reshape(1, 1, 3, 1), kernel.reshape(1, 2, 1, 1), padding="VALID")
        return jnp.sum(y.reshape(2) * jnp.array([1.0, 5.0]))

    value, (dx, dkernel) = jax.value_and_grad(weighted, (0, 1))(x, kernel)
    assert value == 12 + 5 * 23
    np.testing.assert_allclose(dx, [10.0, 1.0 + 50.0, 5.0])
    np.testing.assert_allclose(dkernel, [1.0 + 5 * 2.0, 2.0 + 5 * 3.0])


def test_first_and_second_derivatives_by_finite_differences():
    window = {"strides": (2, 3), "padding": ((1, 2), (0, 4)), "dilation": (2, 1)}
    with jax.enable_x64(True):
        x, kernel, _ = arrays((5, 4), (3, 2), rank=2, channels=2, dtype=np.float64, **window)
        function = jax.jit(functools.partial(shifted, **window))
        check_grads(function, (x, kernel), order=2, modes=("rev",), atol=1e-6, rtol=1e-6)


def test_float64():
    with jax.enable_x64(True):
        operands = arrays((11, 9), (3, 3), dtype=np.float64, **WINDOW)
        actual = output_and_gradients(*operands, **WINDOW)
    assert all(a.dtype == np.float64 for a in actual)
    assert_close(actual, in_torch(*operands, **WINDOW), 1e-13)


def test_no_convolution_is_left():
    x, kernel, dy = arrays((11, 9), (3, 3), rank=2, **WINDOW)
    lowered = {
        lowering: output_and_gradients.lower(x, kernel, dy, **WINDOW, lowering=lowering).as_text()
        for lowering in ("shifted", "grouped")
    }
    assert "convolution" in lowered["grouped"]
    assert "convolution" not in lowered["shifted"]


def test_in_a_scan():
    x, kernel, _ = arrays((6, 5), (3, 3), **WINDOW)

    def trained(conv):
        def step(kernel, x):
            value, gradient = jax.value_and_grad(
                lambda k: jnp.mean(jnp.square(conv(x, k, **WINDOW)))
            )(kernel)
            return kernel - 0.01 * gradient, value

        return jax.jit(lambda kernel, xs: lax.scan(step, kernel, xs))(kernel, x[:, None])

    assert_close(trained(shifted), trained(grouped), 1e-5)


def test_gradient_of_vmap_and_checkpoint():
    x, kernel, _ = arrays((6, 5), (3, 3), rank=2, batch=4, **WINDOW)
    xs, kernels = x.reshape(2, 2, *x.shape[1:]), jnp.stack([kernel, -2 * kernel])

    def loss(conv, xs, kernels):
        each = jax.vmap(conv)(xs, kernels)
        shared = jax.vmap(conv, (None, 0))(xs[0], kernels)
        return jnp.sum(jnp.sin(each)) + jnp.sum(jnp.square(shared))

    def result(conv):
        return jax.jit(jax.value_and_grad(functools.partial(loss, conv), (0, 1)))(xs, kernels)

    conv = jax.checkpoint(functools.partial(shifted, **WINDOW))
    assert_close(result(conv), result(functools.partial(grouped, **WINDOW)), 1e-5)


def test_vmap_of_gradients():
    x, kernel, _ = arrays((6, 5), (3, 3), batch=3, **WINDOW)

    def per_example(conv):
        def loss(kernel, x):
            return jnp.sum(jnp.square(conv(x[None], kernel, **WINDOW)))

        return jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(kernel, x)

    assert_close(per_example(shifted), per_example(grouped), 1e-5)


def test_forward_mode_is_refused():
    x, kernel, _ = arrays((6, 5), (3, 3), **WINDOW)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(functools.partial(shifted, **WINDOW), (x, kernel), (x, kernel))


def test_sharded_batch():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x, kernel, dy = arrays((11, 9), (3, 3), batch=16, **WINDOW)
    expected = in_torch(x, kernel, dy, **WINDOW)
    batch = NamedSharding(mesh, PartitionSpec("data"))
    x, dy = jax.device_put((x, dy), batch)
    kernel = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))
    compiled = output_and_gradients.lower(x, kernel, dy, **WINDOW).compile()
    y, dx, dkernel = compiled(x, kernel, dy)
    assert_close((y, dx, dkernel), expected, 1e-5)
    assert y.sharding.is_equivalent_to(batch, 4) and dx.sharding.is_equivalent_to(batch, 4)
    # One sum over the devices, of the kernel gradient; no image moves.
    text = compiled.as_text()
    assert text.count(" all-reduce(") == 1
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
