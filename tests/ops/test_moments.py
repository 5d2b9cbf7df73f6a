"""Mean and variance that a convolution finds with its output, held against float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from layers import assert_close, normal

from chansel_jax import ChannelSelectionConv, SubKernelConv, lowering, resnet14
from chansel_jax.conv import BatchNorm
from chansel_jax.norm import with_moments
from chansel_jax.ops import native
from chansel_jax.ops.dense import dense_conv
from chansel_jax.ops.moments import finding_moments
from chansel_jax.ops.norm import batch_norm
from chansel_jax.ops.selection import channel_selection
from chansel_jax.ops.window import Window

COMPILED = [native] if native.available() else []
CONVS = [ChannelSelectionConv, SubKernelConv]


def found_with(convolve, *operands):
    """The output and its moments."""
    with finding_moments() as found:
        y = convolve(*operands)
    ((output, moments),) = found
    assert output is y
    return y, *moments


def in_float64(y):
    rows = np.asarray(y, np.float64).reshape(-1, y.shape[-1])
    return rows.mean(0), rows.var(0)


def assert_moments(y, mean, variance):
    """Of `y`: within a few roundings of its size, which its deviation is no larger than."""
    expected_mean, expected_variance = in_float64(y)
    size = np.abs(np.asarray(y)).max()
    np.testing.assert_allclose(mean, expected_mean, rtol=2e-6, atol=2e-6 * size)
    np.testing.assert_allclose(variance, expected_variance, rtol=2e-5, atol=1e-12 * size**2)


def test_by_hand():
    """Pixels 1, 3 of one channel, doubled: 2 and 6, of mean 4 and variance 4."""
    x, one = jnp.array([1.0, 3.0]).reshape(1, 1, 2, 1), jnp.ones((1, 1, 1, 1))
    y, mean, variance = jax.jit(functools.partial(found_with, dense_conv))(x, 2 * one)
    np.testing.assert_array_equal(y.ravel(), [2, 6])
    np.testing.assert_array_equal((mean, variance), [[4], [4]])


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(
    size=st.tuples(*[st.integers(1, 4), st.integers(3, 12), st.integers(3, 40)]),
    channels=st.tuples(*[st.integers(1, 20), st.integers(1, 40)]),
    stride=st.integers(1, 2),
    mean=st.sampled_from([0, 100]),
)
def test_any_shape_like_float64(size, channels, stride, mean):
    x, pointwise, depthwise, kernel = normal(
        (*size, channels[0]), channels, (3, 3, 1, channels[1]), (3, 3, *channels)
    )
    x = jax.device_put(np.asarray(x) + np.float32(mean))
    how = {"strides": stride, "padding": "VALID"}  # a border of zeros would be the variance
    for convolve, kernels in ((channel_selection, (pointwise, depthwise)), (dense_conv, (kernel,))):
        convolve = functools.partial(convolve, **how)
        y, *moments = jax.jit(functools.partial(found_with, convolve))(x, *kernels)
        np.testing.assert_array_equal(y, jax.jit(convolve)(x, *kernels))
        assert_moments(y, *moments)


@pytest.mark.parametrize("most", native.INSTRUCTION_SETS)
@pytest.mark.parametrize("library", COMPILED)
def test_every_instruction_set_in_float32_and_64(library, most):
    with jax.enable_x64(True):
        given = normal((9, 120, 129, 3), (3, 18), (3, 3, 2, 9), (3, 3, 3, 9), dtype=jnp.float64)
    library.limit_instruction_set(most)
    try:
        for dtype in ("float32", "float64"):
            with jax.enable_x64(True):
                x, pointwise, depthwise, kernel = (each.astype(dtype) for each in given)
                select = jax.jit(functools.partial(found_with, channel_selection))
                dense = jax.jit(functools.partial(found_with, dense_conv))
                assert_moments(*select(x, pointwise, depthwise))
                assert_moments(*dense(x, kernel))
    finally:
        library.limit_instruction_set()


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize(
    "kind, tolerance", [("first pixels 0", 2e-4), ("0 or 1.2345", 3e-6), ("normal", 1e-6)]
)
def test_large_images_are_as_exact_as_a_pass_of_its_own(conv, kind, tolerance):
    """Their first pixels may be unlike all others, and their numbers many."""
    (x,) = normal((4, 224, 224, 1))
    if kind == "first pixels 0":
        x = (1000 + x).at[:, 0, 0].set(0)
    elif kind == "0 or 1.2345":
        x = 1.2345 * (x > 0).astype(x.dtype)
    layer = conv(1, 4, (1, 1), use_bias=False, rngs=nnx.Rngs(0))
    y, mean, variance = jax.jit(functools.partial(found_with, layer))(x)
    expected_mean, expected_variance = in_float64(y)
    deviation = np.sqrt(expected_variance)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-6, atol=1e-6 * deviation.max())
    np.testing.assert_allclose(variance, expected_variance, rtol=tolerance)


def layers(conv=ChannelSelectionConv, **how):
    conv = conv(4, 6, (3, 3), use_bias=False, rngs=nnx.Rngs(0), **how)
    return conv, BatchNorm(6, rngs=nnx.Rngs(1))


def as_function(conv, norm, *, known, relu=True):
    """Of images and all parameters, what follows the convolution, and the new statistics."""
    graph, *states = nnx.split((conv, norm), nnx.Param, ...)
    params, others = map(nnx.to_pure_dict, states)

    def apply(x, params):
        conv, norm = nnx.merge(graph, params, others)
        y, moments = with_moments(norm, conv, x) if known else (conv(x), None)
        assert (moments is not None) == known
        y = norm(y, relu=relu, moments=moments)
        return y, norm.mean[...], norm.var[...]

    return apply, params


def loss(apply, x, params):
    y, mean, variance = apply(x, params)
    weights = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
    return jnp.sum(jnp.square(y) * weights) + jnp.sum(mean * variance)


TRANSFORMS = {
    "output": lambda apply: apply,
    "gradients": lambda apply: jax.grad(functools.partial(loss, apply), (0, 1)),
    "tangent": lambda apply: lambda *given: jax.jvp(apply, given, given),
    "gradient of a gradient": lambda apply: jax.grad(
        lambda x, params: jnp.sum(jnp.sin(jax.grad(functools.partial(loss, apply))(x, params)))
    ),
    "recomputed": lambda apply: jax.grad(functools.partial(loss, jax.checkpoint(apply)), (0, 1)),
    "each of several": lambda apply: (
        lambda x, params: jax.vmap(apply, (0, None))(jnp.stack([x, x + 1]), params)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("conv", CONVS)
def test_with_and_without_like_xla(conv, transform):
    (x,) = normal((3, 6, 5, 4))
    transformed = TRANSFORMS[transform]
    found = []
    for known in (True, False):
        apply, params = as_function(*layers(conv), known=known)
        found.append(jax.jit(transformed(apply))(x, params))
    with lowering("lax" if conv is SubKernelConv else "composed"):
        apply, params = as_function(*layers(conv), known=False)
        found.append(jax.jit(transformed(apply))(x, params))
    given = [jax.tree.leaves(each) for each in found]
    assert_close(given[0], given[1], 1e-4)
    assert_close(given[0], given[2], 1e-3)


@pytest.mark.parametrize("library", COMPILED)
def test_statistics_are_computed_once(library):
    """By the convolution in C++; behind one that XLA computes, by a call of their own."""
    (x,) = normal((4, 8, 8, 4))
    counts = {}
    for most in ("avx512", "baseline"):  # with which XLA's convolution is the faster
        library.limit_instruction_set(most)
        try:
            apply, params = as_function(*layers(), known=True)
            text = jax.jit(apply).lower(x, params).compile().as_text()
            assert_close(jax.jit(apply)(x, params), apply(x, params), 1e-4)
        finally:
            library.limit_instruction_set()
        calls = ("chansel_forward", "chansel_moments", "chansel_norm_forward")
        counts[most] = [text.count(f'"{call}"') for call in calls]
    assert counts["baseline"] == [0, 1, 1]
    if library.instruction_set() != "baseline":
        assert counts["avx512"] == [1, 0, 1]


def test_whoever_needs_none_is_given_none():
    (x,) = normal((2, 5, 5, 4))
    conv, norm = layers()
    with_bias = ChannelSelectionConv(4, 6, (3, 3), rngs=nnx.Rngs(0))
    assert with_moments(norm, conv, x)[1] is not None
    for other in (
        (nnx.view(norm, use_running_average=True), conv),
        (nnx.BatchNorm(6, rngs=nnx.Rngs(0)), conv),
        (norm, with_bias),
        (norm, nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0))),
        (norm, nnx.jit(conv)),
    ):
        y, moments = with_moments(*other, x)
        assert moments is None
        assert_close(y, other[1](x), 1e-5)
    assert with_moments(norm, conv, x.astype(jnp.bfloat16))[1] is not None  # promoted to float32
    narrow = ChannelSelectionConv(4, 6, (3, 3), use_bias=False, dtype="bfloat16", rngs=nnx.Rngs(0))
    assert with_moments(norm, narrow, x)[1] is None


def test_statistics_of_a_batch_that_is_divided_are_of_the_whole():
    (x,) = normal((4, 6, 5, 4))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    apply, params = as_function(*layers(), known=True)
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    gradients = TRANSFORMS["gradients"](apply)
    for function in (apply, gradients):
        whole = jax.tree.leaves(jax.jit(function)(x, jax.device_get(params)))
        assert_close(jax.tree.leaves(jax.jit(function)(divided, params)), whole, 1e-4)


def test_what_is_exported_calls_nothing():
    (x,) = normal((2, 5, 5, 4))
    apply, params = as_function(*layers(), known=True)
    exported = export.export(jax.jit(apply))(x, params)
    assert "@chansel" not in exported.mlir_module()
    assert_close(exported.call(x, params), apply(x, params), 1e-4)


@pytest.mark.parametrize(
    "moments, message",
    [
        ((jnp.ones(3), jnp.ones(4)), "mean of shape .* in moments must be of"),
        ((jnp.ones(4), jnp.ones(4, jnp.bfloat16)), "variance of shape .* in moments must be of"),
        ((jnp.ones(4),), "moments of length 1 must be mean and variance"),
    ],
)
def test_wrong_moments_are_refused(moments, message):
    with pytest.raises(ValueError, match=message):
        batch_norm(jnp.ones((2, 4)), jnp.ones(4), jnp.ones(4), moments=moments)


def test_what_is_traced_within_keeps_no_moments():
    """By a convolution that is compiled or recomputed on its own; no tracer of it stays either."""
    (x,) = normal((2, 5, 5, 4))
    conv, norm = layers()
    graph, state = nnx.split(conv)

    def plain(x):
        return nnx.merge(graph, state)(x)

    for wrapped in (jax.jit(plain), jax.checkpoint(plain)):
        with jax.checking_leaks():
            y, moments = with_moments(norm, wrapped, x)
        assert moments is None
        assert_close(y, plain(x), 1e-5)
        assert "with_moments" not in str(jax.make_jaxpr(wrapped)(x))


@pytest.mark.parametrize("library", COMPILED)
def test_output_is_linear_in_the_images(library):
    (x, kernel) = normal((2, 5, 5, 4), (3, 3, 4, 6))

    def convolve(x):
        return found_with(dense_conv, x, kernel)[0]

    y = convolve(x)
    (back,) = jax.linear_transpose(convolve, x)(y)
    expected = jax.vjp(lambda x: dense_conv(x, kernel), x)[1](y)
    assert_close(back, expected[0], 1e-5)


def test_a_subclass_is_given_what_it_knows():
    class Own(type(layers()[1])):
        def __call__(self, x, use_running_average=None, *, mask=None, residual=None, relu=False):
            return super().__call__(2 * x, use_running_average, residual=residual, relu=relu)

    (x,) = normal((2, 5, 5, 4))
    conv, _ = layers()
    assert with_moments(Own(6, rngs=nnx.Rngs(1)), conv, x)[1] is None
    network = resnet14(width=4, blocks=(1,), rngs=nnx.Rngs(0))
    network.blocks[0].norm1 = Own(4, rngs=nnx.Rngs(0))
    assert network(jnp.ones((2, 8, 8, 3))).shape == (2, 3)


@pytest.mark.parametrize("library", COMPILED)
def test_dtypes_whose_outputs_are_rounded_have_none(library):
    x, kernel = (each.astype("bfloat16") for each in normal((2, 5, 5, 4), (3, 3, 4, 6)))
    with pytest.raises(ValueError, match="x of dtype bfloat16 must be of one of"):
        library.dense_conv(x, kernel, Window.of(), moments=True)
