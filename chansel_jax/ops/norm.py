"""Batch normalisation, with the sum and the ReLU that may follow it.

Where a program may call C++ it does; everywhere else, and for all derivatives but the first in
reverse mode, it is what XLA makes of the definition. As in `chansel_jax.ops.late`, that is decided
when a program is compiled. (Ioffe and Szegedy, "Batch Normalization", 2015.)
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from chansel_jax.ops import native
from chansel_jax.ops.late import always_compile, by_jax, place_of, some_of, varying_alike
from chansel_jax.ops.lowerings import nearest_asked_for
from chansel_jax.ops.moments import Moments, mean_and_variance


class Form(NamedTuple):
    """What of a call is no array.

    Attributes:
        epsilon: is added to the variances.
        relu: whether ReLU follows.
        known: whether mean and variance of `x` are the last operands; then C++ does not compute
            them, while XLA, which can do so in another pass over it, does.
    """

    epsilon: float
    relu: bool
    known: bool = False


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None = None,
    *,
    relu: bool = False,
    epsilon: float = 1e-5,
    moments: Moments | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`relu((x - mean) / sqrt(var + epsilon) * scale + bias + residual)`, by the batch's own mean.

    The statistics are those of the whole batch, over however many devices it is sharded; within
    `jax.shard_map` those of each device's part. They are computed in float32, or in float64 where
    that is the dtype of `x`.

    Args:
        x: `(..., C)`, not empty.
        scale: `(C,)`.
        bias: `(C,)`.
        residual: of the shape and dtype of `x`; by default nothing is added.
        relu: whether ReLU follows. Default False.
        epsilon: is added to the variances. Default 1e-5.
        moments: mean and variance of `x`, if they are known already
            (`chansel_jax.ops.moments.finding_moments`); they are not differentiated, since the
            derivatives by `x` take account of them.

    Returns:
        The output, of the shape and dtype of `x`; and mean and variance `(C,)` of each channel, in
        float32 or float64, through which no gradient flows.

    Raises:
        ValueError: if the shapes or dtypes do not fit each other.
    """
    given = (x, scale, bias) if residual is None else (x, scale, bias, residual)
    x, scale, bias, *added = map(jnp.asarray, given)
    _check(x, scale, bias, added)
    wide = _dtype_of_sums(x)
    operands = (x, scale.astype(wide), bias.astype(wide), *added)
    known = _known(x, moments)
    form = Form(float(epsilon), bool(relu), bool(known))
    if nearest_asked_for(("auto", "lax")) == "lax" or _is_explicit(x):
        return tuple(_definition(*operands, *known, form=form))
    return tuple(_output.bind(*varying_alike(*operands, *known), form=form))


def _check(x: jax.Array, scale: jax.Array, bias: jax.Array, added: Sequence[jax.Array]) -> None:
    if x.ndim < 2 or not x.size or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x of shape {x.shape} and {x.dtype} must be (..., C) of floats, not empty"
        )
    for name, array in (("scale", scale), ("bias", bias)):
        if array.shape != x.shape[-1:]:
            raise ValueError(f"{name} of shape {array.shape} must be {x.shape[-1:]}")
    for array in added:
        if (array.shape, array.dtype) != (x.shape, x.dtype):
            raise ValueError(
                f"residual of shape {array.shape} and {array.dtype} must be of the {x.shape} and "
                f"{x.dtype} of x"
            )


def _known(x: jax.Array, moments: Moments | None) -> Moments | tuple[()]:
    if moments is None:
        return ()
    if len(moments) != 2:
        raise ValueError(f"moments of length {len(moments)} must be mean and variance")
    moments = tuple(map(jnp.asarray, moments))
    for name, array in zip(("mean", "variance"), moments, strict=True):
        if (array.shape, array.dtype) != (x.shape[-1:], _dtype_of_sums(x)):
            raise ValueError(
                f"{name} of shape {array.shape} and {array.dtype} in moments must be of "
                f"{x.shape[-1:]} and {_dtype_of_sums(x)}"
            )
    return moments


def _dtype_of_sums(x: jax.Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


def _is_explicit(x: jax.Array) -> bool:
    """Whether arrays carry how they are sharded, which XLA's form has rules for."""
    sharding = jax.typeof(x).sharding
    return sharding.mesh.size > 1 and any(axis is not None for axis in sharding.spec)


def _own_and_known(operands: Sequence, form: Form) -> tuple[Sequence, Sequence]:
    """The operands, and mean and variance behind them, if they are known."""
    count = len(operands) - 2 * form.known
    return operands[:count], operands[count:]


def _definition(*operands: jax.Array, form: Form) -> list[jax.Array]:
    (x, scale, bias, *added), _ = _own_and_known(operands, form)
    wide = x.astype(_dtype_of_sums(x))
    mean, variance = mean_and_variance(wide)
    multiplier = lax.rsqrt(variance + form.epsilon) * scale
    y = ((wide - _of_pixels(mean, x)) * _of_pixels(multiplier, x) + _of_pixels(bias, x)).astype(
        x.dtype
    )
    for residual in added:
        y = y + residual
    if form.relu:
        y = jax.nn.relu(y)
    return [y, lax.stop_gradient(mean), lax.stop_gradient(variance)]


def _of_pixels(channels: jax.Array, x: jax.Array) -> jax.Array:
    return channels.reshape(*[1] * (x.ndim - 1), -1)


# Three primitives: the output with the statistics, the output's tangent, and its gradients. The
# latter two are given the output and the statistics, so as not to compute them anew; what is
# differentiated further does.

_output = Primitive("batch_norm")
_tangent = Primitive("batch_norm_tangent")
_gradients = Primitive("batch_norm_gradients")
_output.multiple_results = _gradients.multiple_results = True


def _split(arguments: Sequence, count: int) -> tuple[Sequence, Sequence, Sequence]:
    """The operands, `count` of them; output, mean and variance; and what is left."""
    return arguments[:count], arguments[count : count + 3], arguments[count + 3 :]


def _xla_tangent(*arguments: jax.Array, form: Form, which: tuple[bool, ...]) -> jax.Array:
    operands, _, given = _split(arguments, len(which))
    of_some, *some = some_of(functools.partial(_definition, form=form), operands, which)
    return jax.jvp(of_some, some, list(given))[1][0]


def _redefined_gradients(*arguments: jax.Array, form: Form) -> list[jax.Array]:
    """As functions of the operands alone, for their own derivatives."""
    *operands, _, _, _, dy = arguments
    _, pull = jax.vjp(lambda *operands: _definition(*operands, form=form)[0], *operands)
    return list(pull(dy))


def _xla_gradients(*arguments: jax.Array, form: Form) -> list[jax.Array]:
    *operands, y, mean, variance, dy = arguments
    x, scale, bias, *added = operands
    if form.relu:
        dy = jnp.where(y > 0, dy, 0)
    wide, axes = dy.astype(mean.dtype), tuple(range(x.ndim - 1))
    inverse = lax.rsqrt(variance + form.epsilon)
    normalised = (x.astype(mean.dtype) - _of_pixels(mean, x)) * _of_pixels(inverse, x)
    dscale, dbias = (wide * normalised).sum(axes), wide.sum(axes)
    pixels = math.prod(x.shape[:-1])
    back = wide - _of_pixels(dbias / pixels, x) - normalised * _of_pixels(dscale / pixels, x)
    dx = (back * _of_pixels(inverse * scale, x)).astype(x.dtype)
    return [dx, dscale, dbias, *([dy] if added else [])]


@jax.named_scope("batch_norm")
def _native_output(*operands: jax.Array, form: Form) -> list[jax.Array]:
    operands, moments = _own_and_known(operands, form)
    how = {"epsilon": form.epsilon, "relu": form.relu}
    return native.batch_norm(*operands, moments=moments, **how)


@jax.named_scope("batch_norm")
def _native_gradients(*arguments: jax.Array, form: Form) -> list[jax.Array]:
    *operands, y, mean, variance, dy = arguments
    return native.batch_norm_gradients(
        *(*operands[:3], y, mean, variance, dy),
        epsilon=form.epsilon,
        relu=form.relu,
        residual=len(operands) > 3,
    )


# Shapes


def _output_types(x: Any, *_: Any, form: Form) -> list[Any]:
    spec = NamedSharding(x.sharding.mesh, PartitionSpec())
    statistics = x.update(
        shape=x.shape[-1:], dtype=_dtype_of_sums(x), weak_type=False, sharding=spec
    )
    return [x.update(weak_type=False), statistics, statistics]


def _tangent_type(x: Any, *_: Any, form: Form, which: tuple[bool, ...]) -> Any:
    return x.update(weak_type=False)


def _gradient_types(*arguments: Any, form: Form) -> list[Any]:
    *operands, _, _, _, _ = arguments
    return [operand.update(weak_type=False) for operand in operands]


# Rules


def _output_jvp(primals: Sequence, tangents: Sequence, form: Form) -> tuple[list, list]:
    results = _output.bind(*primals, form=form)
    (primals, _), (tangents, _) = (_own_and_known(each, form) for each in (primals, tangents))
    form = form._replace(known=False)
    which = tuple(type(tangent) is not ad.Zero for tangent in tangents)
    given = [tangent for tangent, has_one in zip(tangents, which, strict=True) if has_one]
    found = _tangent.bind(*primals, *results, *given, form=form, which=which)
    of_statistics = [ad.Zero(jax.typeof(each).to_tangent_aval()) for each in results[1:]]
    return results, [found, *of_statistics]


def _tangent_transpose(dy: Any, *arguments: Any, form: Form, which: tuple[bool, ...]) -> list:
    operands, results, given = _split(arguments, len(which))
    known = [None] * (len(operands) + len(results))
    if type(dy) is ad.Zero:
        return known + [ad.Zero(each.aval) for each in given]
    found = _gradients.bind(*operands, *results, dy, form=form)
    return known + [gradient for gradient, has_one in zip(found, which, strict=True) if has_one]


def _batched(primitive: Primitive, defined: Callable) -> Callable:
    def rule(arguments: Sequence, axes: Sequence, **how: Any) -> tuple[Any, Any]:
        found = jax.vmap(functools.partial(defined, **how), axes)(*arguments)
        return found, [0] * len(found) if primitive.multiple_results else 0

    return rule


def _lowered(
    primitive: Primitive, by_xla: Callable, in_native: Callable | None, platform: str | None
) -> Callable:
    def rule(context: mlir.LoweringRuleContext, *arguments: Any, **how: Any) -> Any:
        place, devices = place_of(context, platform)
        calls = in_native and place.calls and not devices and native.available()
        calls = calls and _pays(context.avals_in[0])
        types = [ShapedArray(aval.shape, aval.dtype) for aval in context.avals_in]
        computed = functools.partial(in_native if calls else by_xla, **how)
        lowered = mlir.lower_fun(computed, multiple_results=primitive.multiple_results)
        return lowered(context.replace(avals_in=types), *arguments)

    return rule


def _pays(x: Any) -> bool:
    """Whether C++ has the dtype, and does not compute more padding than pixels."""
    return str(x.dtype) in native.DTYPES and math.lcm(x.shape[-1], native.MOST_LANES) <= x.size


def _register(
    primitive: Primitive,
    by_xla: Callable,
    types: Callable,
    jvp: Callable,
    *,
    in_native: Callable | None = None,
    defined: Callable | None = None,
) -> None:
    always_compile(primitive, ("form", "which"))
    primitive.def_abstract_eval(types)
    ad.primitive_jvps[primitive] = jvp
    batching.primitive_batchers[primitive] = _batched(primitive, defined or by_xla)
    for platform in (None, "cpu"):
        rule = _lowered(primitive, by_xla, in_native, platform)
        mlir.register_lowering(primitive, rule, platform)


_register(_output, _definition, _output_types, _output_jvp, in_native=_native_output)
_register(
    _tangent,
    _xla_tangent,
    _tangent_type,
    by_jax(_tangent, functools.partial(functools.partial, _xla_tangent)),
)
_register(
    _gradients,
    _xla_gradients,
    _gradient_types,
    by_jax(_gradients, functools.partial(functools.partial, _redefined_gradients)),
    in_native=_native_gradients,
    defined=_redefined_gradients,
)
ad.primitive_transposes[_tangent] = _tangent_transpose
