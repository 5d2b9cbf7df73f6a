"""The layer, held against `flax.nnx.BatchNorm`."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from layers import normal

from chansel_jax.norm import BatchNorm
from chansel_jax.ops import native


def trained(kind, x, *, mask=None, **options):
    """Output, statistics and gradients of a layer after two batches."""
    layer = kind(x.shape[options.get("axis", -1)], rngs=nnx.Rngs(0), **options)
    for variable in (layer.scale, layer.bias):
        if variable is not None:
            (value,) = normal(variable.shape)
            variable[...] = (1 + value / 4).astype(variable.dtype)
    graph, *states = nnx.split(layer, nnx.Param, ...)
    params, others = map(nnx.to_pure_dict, states)

    @jax.jit
    def step(params, others, x):
        def loss(params, x, others):
            layer = nnx.merge(graph, params, others)
            y = layer(x, mask=mask)
            return jnp.sum(jnp.square(y.astype(jnp.float32)) * y.dtype.type(0.5)), (
                y,
                nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)),
            )

        return jax.grad(loss, (0, 1), has_aux=True)(params, x, others)

    for batch in (x, 2 * x + 1):
        gradients, (y, others) = step(params, others, batch)
    return y, others, gradients


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((4, 5, 6, 7), {}),
        ((9, 3), {"momentum": 0.5, "epsilon": 0.1}),
        ((4, 5, 6, 7), {"dtype": jnp.float32}),
        ((4, 5, 3), {"axis": 1}),
        ((4, 5, 3), {"use_scale": False}),
        ((4, 5, 3), {"use_bias": False}),
        ((4, 5, 3), {"use_fast_variance": False}),
        ((4, 5, 3), {"epsilon": np.float32(0.1)}),
        ((4, 5, 3), {"mask": np.arange(20).reshape(4, 5, 1) % 3 > 0}),
    ],
)
def test_trains_as_that_of_flax_does(shape, options):
    (x,) = normal(shape)
    found, expected = (trained(kind, x, **options) for kind in (BatchNorm, nnx.BatchNorm))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


def test_trains_in_bfloat16_as_that_of_flax_does():
    (x,) = normal((8, 5, 6, 4))
    found, expected = (
        trained(kind, x, dtype=jnp.bfloat16)[:2] for kind in (BatchNorm, nnx.BatchNorm)
    )
    chex.assert_trees_all_close(found, expected, rtol=2e-2, atol=2e-2)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


@pytest.mark.parametrize("averages", [False, True])
@pytest.mark.parametrize(
    ("dtype", "param_dtype"), [(None, jnp.bfloat16), (jnp.bfloat16, jnp.float32)]
)
def test_dtypes_are_those_of_flax_in_both_modes(averages, dtype, param_dtype):
    options = {"dtype": dtype, "param_dtype": param_dtype, "use_running_average": averages}
    x, residual = normal((4, 5, 6), (4, 5, 6))
    given = x.astype(jnp.bfloat16)
    own, flax = (kind(6, **options, rngs=nnx.Rngs(0)) for kind in (BatchNorm, nnx.BatchNorm))
    assert own(given).dtype == own(given, residual=residual).dtype == flax(given).dtype


def test_dtypes_that_do_not_promote_are_taken_as_flax_takes_them():
    (x,) = normal((4, 6))
    with jax.numpy_dtype_promotion("strict"):
        layer = BatchNorm(6, dtype=jnp.float32, rngs=nnx.Rngs(0))
        assert layer(x.astype(jnp.bfloat16)).dtype == jnp.float32
    layer = BatchNorm(6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer(x.astype(jnp.float8_e4m3fn)).dtype == jnp.bfloat16


@pytest.mark.parametrize("averages", [False, True])
def test_residual_of_another_shape_is_named(averages):
    layer = BatchNorm(6, use_running_average=averages, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"residual of shape \(1, 6\) must be of the \(4, 6\)"):
        layer(jnp.ones((4, 6)), residual=jnp.ones((1, 6)))


@pytest.mark.parametrize("averages", [False, True])
def test_adds_and_rectifies(averages):
    x, residual = normal((4, 5, 6), (4, 5, 6))
    layers = [kind(6, rngs=nnx.Rngs(0)) for kind in (BatchNorm, nnx.BatchNorm)]
    view = [nnx.view(layer, use_running_average=averages) for layer in layers]
    plain, own = view[1](x), view[0](x, residual=residual, relu=True)
    chex.assert_trees_all_close(own, nnx.relu(plain + residual), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(*map(nnx.state, view), rtol=1e-5, atol=1e-6)


def test_its_mode_is_asked_for_as_flax_does():
    layer = BatchNorm(3, use_running_average=None, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="use_running_average"):
        layer(jnp.ones((2, 3)))
    before = nnx.state(layer)
    layer(jnp.ones((2, 3)), use_running_average=True)
    chex.assert_trees_all_equal(nnx.state(layer), before)


def test_has_the_parameters_of_that_of_flax():
    layers = [kind(6, rngs=nnx.Rngs(3)) for kind in (BatchNorm, nnx.BatchNorm)]
    chex.assert_trees_all_equal(*map(nnx.to_pure_dict, map(nnx.state, layers)))
    assert isinstance(layers[0], nnx.BatchNorm)


@pytest.mark.parametrize("library", [native] if native.available() else [])
def test_a_step_calls_c_plus_plus(library):
    (x,) = normal((4, 5, 6, 8))
    layer = BatchNorm(8, rngs=nnx.Rngs(0))
    graph, *states = nnx.split(layer, nnx.Param, ...)
    params, others = map(nnx.to_pure_dict, states)

    def loss(params, others):
        return jnp.sum(jnp.square(nnx.merge(graph, params, others)(x, relu=True)))

    text = jax.jit(jax.grad(loss)).lower(params, others).compile().as_text()
    assert text.count("chansel_norm_forward") and text.count("chansel_norm_backward")
