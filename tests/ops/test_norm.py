"""Batch normalisation in C++ and by XLA, held against PyTorch, float64 and its definition."""

import functools
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads
from layers import assert_close, normal

from chansel_jax import lowering
from chansel_jax.ops import native
from chansel_jax.ops.norm import batch_norm

FORMS = list(itertools.product((False, True), repeat=2))  # of residual and ReLU
SHAPES = ((6, 5), (7, 3, 4), (4, 5, 6, 16), (3, 9, 7, 20), (8, 16, 16, 32), (20, 3, 1001))
COMPILED = [native] if native.available() else []


def arrays(shape, residual, dtype=jnp.float32, mean=40):
    """The operands, and the gradient of the output; a mean far from 0 beside the deviation."""
    rng = np.random.default_rng(0)
    sizes = shape, shape, shape, shape[-1:], shape[-1:]
    x, added, dy, scale, bias = (rng.standard_normal(size) for size in sizes)
    operands = [3 * x + mean, scale, bias, *([added] if residual else [])]
    return jax.device_put([each.astype(dtype) for each in operands]), jax.device_put(
        dy.astype(dtype)
    )


def in_torch(operands, dy, relu, epsilon=1e-5):
    """PyTorch's output, statistics and gradients, in float64."""
    x, scale, bias, *added = (
        torch.tensor(np.asarray(each, np.float64), requires_grad=True) for each in operands
    )
    rows = x.reshape(-1, x.shape[-1])
    mean, variance = rows.mean(0), rows.var(0, unbiased=False)
    y = torch.nn.functional.batch_norm(rows, None, None, scale, bias, training=True, eps=epsilon)
    y = y.reshape(x.shape) + sum(added)
    y = torch.relu(y) if relu else y
    given = [x, scale, bias, *added]
    gradients = torch.autograd.grad(y, given, torch.tensor(np.asarray(dy, np.float64)))
    return [each.detach().numpy() for each in (y, mean, variance, *gradients)]


def computed(function, operands, dy):
    """Output, statistics and gradients of `function`, in one program."""

    def both(*operands):
        y, pull, statistics = jax.vjp(
            lambda *operands: (lambda y, *others: (y, others))(*function(*operands)),
            *operands,
            has_aux=True,
        )
        return y, *statistics, *pull(dy)

    return jax.jit(both)(*operands)


def calls(function, *arguments):
    """How often the compiled program calls C++."""
    return jax.jit(function).lower(*arguments).compile().as_text().count("chansel_norm")


def loss(x, *others, relu=True):
    y, _, _ = batch_norm(x, *others, relu=relu)
    return jnp.sum(jnp.square(y) * jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))


def test_by_hand():
    """Two pixels of one channel: 1 and 3, of mean 2 and variance 1."""
    x, ones = jnp.array([[1.0], [3.0]]), jnp.ones(1)
    y, mean, variance = batch_norm(x, 2 * ones, ones, epsilon=0.0)
    np.testing.assert_allclose(y, [[-1], [3]], rtol=1e-6)
    np.testing.assert_allclose((mean, variance), [[2], [1]], rtol=1e-6)
    y, _, _ = batch_norm(x, 2 * ones, ones, jnp.array([[0.5], [-5.0]]), relu=True, epsilon=0.0)
    np.testing.assert_array_equal(y, [[0], [0]])


@pytest.mark.parametrize("residual, relu", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_like_torch(shape, residual, relu):
    operands, dy = arrays(shape, residual)
    function = functools.partial(batch_norm, relu=relu)
    assert_close(computed(function, operands, dy), in_torch(operands, dy, relu), 1e-4)
    with lowering("lax"):  # whose variance is the difference of large numbers
        assert_close(computed(function, operands, dy), in_torch(operands, dy, relu), 3e-3)


@pytest.mark.parametrize("library", COMPILED)
def test_one_pixel_far_off_does_not_spoil_the_others_variance(library):
    (x,) = normal((64, 16, 16, 4))
    x = x.at[0, 0, 0].set(1e3)
    _, mean, variance = batch_norm(x, jnp.ones(4), jnp.ones(4))
    wide = np.asarray(x, np.float64).reshape(-1, 4)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance, wide.var(0), rtol=1e-5)


@pytest.mark.parametrize("epsilon", [1e-5, 100.0])
def test_epsilon(epsilon):
    operands, dy = arrays((4, 3), residual=False)
    found = computed(functools.partial(batch_norm, epsilon=epsilon), operands, dy)
    assert_close(found, in_torch(operands, dy, relu=False, epsilon=epsilon), 1e-4)


@hypothesis.settings(max_examples=15, deadline=None)
@hypothesis.given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), channels=st.integers(1, 70)
)
@hypothesis.example(shape=[1], channels=18)
def test_any_shape_like_torch(shape, channels):
    operands, dy = arrays((2, *shape, channels), residual=True, mean=2)
    expected = in_torch(operands, dy, relu=True)
    # What C++ would have to pad too much is XLA's, whose variance is a difference of large numbers.
    by_xla = not COMPILED or math.lcm(channels, native.MOST_LANES) > operands[0].size
    assert_close(batch_norm(*operands, relu=True), expected[:3], 3e-3 if by_xla else 1e-4)


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize(
    "shape, dtype, tolerance",
    [
        ((3, 7, 5, 21), "float32", 1e-4),
        ((3, 7, 5, 21), "bfloat16", 3e-2),
        ((9, 120, 129, 9), "float32", 1e-4),  # 5 MB, which are written past the caches
    ],
)
def test_every_instruction_set_like_torch(library, shape, dtype, tolerance):
    operands, dy = arrays(shape, residual=True, dtype=jnp.dtype(dtype))
    expected = in_torch(operands, dy, relu=False)
    for most in library.INSTRUCTION_SETS:
        library.limit_instruction_set(most)
        assert_close(computed(batch_norm, operands, dy), expected, tolerance)


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize("residual", [False, True])
def test_relu_in_bfloat16_like_its_definition(library, residual):
    """In steps of quarters, which no rounding changes."""
    operands, dy = arrays((6, 4, 16), residual, dtype=jnp.bfloat16)
    operands[0] = jnp.sign(operands[0] - 40).at[:3].set(-1).at[3:].set(1)
    operands[1], operands[2] = jnp.ones(16, jnp.bfloat16), jnp.full(16, 0.25, jnp.bfloat16)
    function = functools.partial(batch_norm, relu=True, epsilon=0.0)
    found = computed(function, operands, dy)
    with lowering("lax"):
        assert_close(found, computed(function, operands, dy), 1e-2)


def test_in_float64():
    with jax.enable_x64():
        operands, dy = arrays((4, 3, 6), residual=True, dtype=jnp.float64)
        function = functools.partial(batch_norm, relu=True)
        assert_close(computed(function, operands, dy), in_torch(operands, dy, relu=True), 1e-11)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_no_number_stays(value):
    """ReLU in C++ does not make zeros of it, and it is in all that is learned from."""
    operands, dy = arrays((4, 3), residual=True)
    operands[0] = operands[0].at[1, 2].set(value)
    y, mean, variance, *gradients = computed(functools.partial(batch_norm, relu=True), operands, dy)
    for each in (mean, variance, gradients[1]):
        assert jnp.isfinite(each).tolist() == [True, True, False]
    if COMPILED:
        assert jnp.isnan(y).any(0).tolist() == [False, False, True]


@pytest.mark.parametrize("library", COMPILED)
def test_c_plus_plus_is_called_where_it_can_be(library):
    (x, *others), _ = arrays((4, 8, 8, 16), residual=True)
    step = jax.value_and_grad(loss, (0, 1, 2, 3))
    assert calls(loss, x, *others) == 1 and calls(step, x, *others) == 2
    with lowering("lax"):
        assert calls(step, x, *others) == 0
    assert calls(loss, x.astype(jnp.float16), *others[:2]) == 0
    assert calls(jax.vmap(loss, (0, None, None)), x, *others[:2]) == 0
    few = jnp.ones((2, 7)), jnp.ones(7), jnp.ones(7)
    assert calls(loss, *few) == 0  # it would compute 112 numbers in the place of 14
    assert "chansel_norm" not in export.export(jax.jit(loss))(x, *others).mlir_module()


# Other derivatives and transformations


@pytest.mark.parametrize("residual, relu", FORMS)
def test_all_derivatives_by_finite_differences(residual, relu):
    with jax.enable_x64():
        operands, _ = arrays((3, 2, 3), residual, dtype=jnp.float64)
        function = functools.partial(loss, relu=relu)
        check_grads(function, operands, order=2, atol=1e-4, rtol=1e-4, eps=1e-5)


def by_definition(x, *others):
    with lowering("lax"):
        return loss(x, *others)


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f: jax.vmap(f, (0, None, None, 0)),
        lambda f: jax.vmap(jax.grad(f, (0, 1)), (0, None, None, 0)),
        lambda f: jax.grad(
            lambda *o: jnp.sum(jnp.sin(jax.vmap(jax.grad(f), (0, None, None, 0))(*o))), (0, 1)
        ),
        lambda f: jax.grad(jax.checkpoint(f), (0, 1, 2, 3)),
        lambda f: jax.grad(
            lambda x, *o: jax.lax.scan(lambda c, x: (c + f(x, *o[:2]), None), 0.0, x)[0]
        ),
        lambda f: lambda *o: jax.jvp(lambda x: f(x, *o[1:]), o[:1], (jnp.cos(o[0]),)),
        lambda f: lambda *o: jax.jvp(jax.grad(f, 1), o, tuple(map(jnp.cos, o))),
        lambda f: jax.grad(lambda x, *o: f(x, o[0], jax.lax.stop_gradient(o[1]), o[2])),
    ],
    ids=[
        "vmap",
        "vmap of grad",
        "grad of vmap of grad",
        "checkpoint",
        "scan",
        "jvp",
        "jvp of grad",
        "some",
    ],
)
def test_transformations_are_those_of_the_definition(transformed):
    operands, _ = arrays((2, 5, 4, 3), residual=True)
    operands[0] = operands[0] - 40
    found, expected = (jax.jit(transformed(f))(*operands) for f in (loss, by_definition))
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), 1e-4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_divided_batch_has_the_statistics_of_the_whole(kind):
    operands, _ = arrays((4, 3, 5), residual=True)
    step = jax.value_and_grad(loss, (0, 1, 2, 3))
    expected = step(*operands)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,), devices=jax.devices()[:2])
    with jax.set_mesh(mesh):
        divided, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
        x, scale, bias, added = operands
        x, added = jax.device_put((x, added), divided)
        found = jax.jit(step)(x, *jax.device_put((scale, bias), whole), added)
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), 1e-4)


def test_each_device_of_shard_map_has_the_statistics_of_its_part():
    (x, scale, bias), _ = arrays((4, 3, 5), residual=False)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    data, whole = PartitionSpec("data"), PartitionSpec()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(data, whole, whole), out_specs=data)
    def local(x, scale, bias):
        y, _, _ = batch_norm(x, scale, bias, relu=True)
        return y

    def total(x, scale, bias):
        return jnp.sum(local(x, scale, bias) ** 3)

    def halves(x, scale, bias):
        parts = [batch_norm(part, scale, bias, relu=True)[0] for part in (x[:2], x[2:])]
        return sum(jnp.sum(part**3) for part in parts)

    found, expected = (
        jax.jit(jax.value_and_grad(f, (0, 1, 2)))(x, scale, bias) for f in (total, halves)
    )
    assert_close(jax.tree.leaves(found), jax.tree.leaves(expected), 1e-4)


# What is refused


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (((4,), (4,), (4,)), r"x of shape \(4,\) and float32 must be"),
        (((0, 4), (4,), (4,)), "not empty"),
        (((2, 4), (3,), (4,)), r"scale of shape \(3,\) must be \(4,\)"),
        (((2, 4), (4,), (4, 1)), r"bias of shape \(4, 1\) must be \(4,\)"),
        (((2, 4), (4,), (4,), (1, 4)), r"residual of shape \(1, 4\) and float32 must be of"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, told):
    with pytest.raises(ValueError, match=told):
        batch_norm(*map(jnp.ones, shapes))


def test_integers_are_named():
    with pytest.raises(ValueError, match="int32 must be"):
        batch_norm(jnp.ones((2, 4), int), jnp.ones(4), jnp.ones(4))


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize(
    "shapes", [((2, 4), (3,), (3,)), ((0, 4), (4,), (4,)), ((9, 4), (4,), (4,), (1, 4))]
)
def test_c_plus_plus_refuses_before_memory_is_touched(library, shapes):
    with pytest.raises(jax.errors.JaxRuntimeError, match="residual, where there is one"):
        found = library.batch_norm(*map(jnp.ones, shapes), relu=False, epsilon=0.0)
        jax.block_until_ready(found)


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize("y, dy", [((1, 4), (9, 4)), ((9, 4), (1, 4)), ((0,), (9, 4))])
def test_gradients_in_c_plus_plus_refuse_too(library, y, dy):
    ones = jnp.ones(4)
    with pytest.raises(jax.errors.JaxRuntimeError, match="residual, where there is one"):
        arguments = jnp.ones((9, 4)), ones, ones, jnp.ones(y), ones, ones, jnp.ones(dy)
        how = {"relu": True, "epsilon": 0.0, "residual": True}
        jax.block_until_ready(library.batch_norm_gradients(*arguments, **how))
