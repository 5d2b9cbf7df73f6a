"""Mean and variance of a convolution's output, computed with it where C++ computes it.

Batch normalisation needs both, and would read the output once more to find them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive, get_opaque_trace_state
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from chansel_jax.ops import late, native
from chansel_jax.ops.late import always_compile, place_of, varying_alike
from chansel_jax.ops.lowerings import NATIVE

Moments = tuple[jax.Array, jax.Array]
Found = list[tuple[jax.Array, Moments]]


@contextlib.contextmanager
def finding_moments() -> Iterator[Found]:
    """Within it, convolutions whose lowering is chosen late find the moments of their outputs too.

    Yields:
        Each such output, and its mean and variance `(C_out,)` over all other axes, through which no
        gradient flows.
    """
    found: Found = []
    here = get_opaque_trace_state()

    def bind(*operands: jax.Array, **how: Any) -> jax.Array:
        # What is traced on its own within, as by jax.jit, is kept and called elsewhere too.
        if get_opaque_trace_state() != here or not _has_moments(how["function"], *operands):
            return late.bind(*operands, **how)
        y, *moments = _primitive.bind(*varying_alike(*operands), **how)
        found.append((y, tuple(moments)))
        return y

    with late.bound_by(bind):
        yield found


def mean_and_variance(y: jax.Array) -> Moments:
    """Those of each channel of `y` `(..., C)`, in the dtype of `y`; in one pass, as by Flax."""
    axes = tuple(range(y.ndim - 1))
    mean = y.mean(axes)
    return mean, jnp.maximum(0, jnp.square(y).mean(axes) - jnp.square(mean))


def _has_moments(function: late.Function, x: jax.Array, *_: jax.Array) -> bool:
    return function.window.dimensions == 2 and str(x.dtype) in native.EXACT_DTYPES and x.size > 0


_primitive = Primitive("multilinear_with_moments")
_primitive.multiple_results = True


def _definition(*operands: jax.Array, **how: Any) -> list[jax.Array]:
    y = late.bind(*operands, **how)
    return [y, *map(lax.stop_gradient, mean_and_variance(y))]


def _types(*operands: Any, **how: Any) -> list[Any]:
    y = late.output_type(*operands, **how)
    everywhere = NamedSharding(y.sharding.mesh, PartitionSpec())
    moment = y.update(shape=y.shape[-1:], sharding=everywhere)
    return [y, moment, moment]


def _jvp(primals: Any, tangents: Any, **how: Any) -> tuple[list, list]:
    found = _primitive.bind(*primals, **how)
    tangent = late.bind_tangent(primals, tangents, **how)
    return found, [tangent, *(ad.Zero(jax.typeof(each).to_tangent_aval()) for each in found[1:])]


def _transpose(cotangents: Any, *operands: Any, **how: Any) -> list:
    dy, *_ = cotangents
    if type(dy) is ad.Zero:
        return [ad.Zero(o.aval) if ad.is_undefined_primal(o) else None for o in operands]
    return late.output_transpose(dy, *operands, **how)


def _batched(operands: Any, axes: Any, **how: Any) -> tuple[Any, Any]:
    found = jax.vmap(lambda *own: _definition(*own, **how), axes)(*operands)
    return found, [0] * len(found)


def _lowered(platform: str | None) -> Any:
    def rule(context: mlir.LoweringRuleContext, *operands: Any, **how: Any) -> Any:
        function, types = how["function"], [ShapedArray(a.shape, a.dtype) for a in context.avals_in]
        place, devices = place_of(context, platform)

        def computed(*operands: jax.Array) -> Any:
            if devices or not place.calls or not native.available():
                return _definition(*operands, **how)
            if function.choose(function, place, *types) in NATIVE:
                return function._replace(moments=True).at(place)(*operands)
            y = late.bind(*operands, **how)
            return [y, *native.moments(y)]

        lowered = mlir.lower_fun(computed, multiple_results=True)
        return lowered(context.replace(avals_in=types), *operands)

    return rule


always_compile(_primitive, ("function", "levels", "divided"))
_primitive.def_abstract_eval(_types)
ad.primitive_jvps[_primitive] = _jvp
ad.primitive_transposes[_primitive] = _transpose
batching.primitive_batchers[_primitive] = _batched
late.define(_primitive, _definition)
for _platform in (None, "cpu"):
    mlir.register_lowering(_primitive, _lowered(_platform), _platform)
