"""The multiply-adds of a function, read off its jaxpr.

Products with sums have them: `dot_general`, `ragged_dot` and `conv_general_dilated`. Everything
else counts nothing: elementwise operations, sums, pooling, sorting, FFTs and decompositions.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from chansel_jax.ops import late

BACKWARD = "transpose("  # what JAX writes around the named scopes of a backward pass


class Work(NamedTuple):
    """The multiply-adds of one operation.

    Attributes:
        scopes: the named scopes that it lies in, the outermost first, as JAX writes them.
        multiply_adds: over all trips of the loops around it.
        at_least: whether one of these loops is a `while` loop, whose trips nobody knows before it
            runs: it counts once.
    """

    scopes: str
    multiply_adds: int
    at_least: bool


def multiply_adds(jaxpr: Jaxpr, scopes: str = "") -> Iterator[Work]:
    """The operations of `jaxpr`, and of all that it calls, that have multiply-adds.

    A `scan` counts as often as it is long, a `while` once, a `cond` as its most expensive branch,
    a `shard_map` for every device, a Pallas kernel for every element of its grid.
    """
    for equation in jaxpr.eqns:
        name, inside = equation.primitive.name, f"{scopes}/{equation.source_info.name_stack}"
        if name in FORMULAS:
            yield Work(inside, FORMULAS[name](equation, BACKWARD in inside), False)
            continue
        calls = [list(multiply_adds(called, inside)) for called in _called(equation)]
        if name == "cond":
            calls = [max(calls, key=lambda works: sum(work.multiply_adds for work in works))]
        trips = TRIPS[name](equation.params) if name in TRIPS else 1
        for work in itertools.chain.from_iterable(calls):
            at_least = work.at_least or name == "while"
            yield Work(work.scopes, trips * work.multiply_adds, at_least)


def _called(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The jaxprs among the parameters of `equation`, whatever it does with them.

    A layer of ours that chooses its lowering when it is compiled is its definition.
    """
    if defined := late.definition(equation):
        yield defined
    params = equation.params
    if equation.primitive.name == "custom_linear_solve":
        params = {"solve": params["jaxprs"].solve}  # beside it stand those of derivatives
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, ClosedJaxpr | Jaxpr):
                yield getattr(each, "jaxpr", each)


def _devices(params: dict[str, Any]) -> int:
    axes = params.get("newly_manual_axes", params.get("manual_axes"))  # so in jax 0.10.0
    return math.prod(params["mesh"].shape[axis] for axis in axes)


TRIPS: dict[str, Callable[[dict[str, Any]], int]] = {
    "scan": lambda params: params["length"],
    "shard_map": _devices,
    "pallas_call": lambda params: math.prod(params["grid_mapping"].grid),
}
"""How often a primitive runs what it calls, by its parameters."""


def _of_dot(equation: JaxprEqn, _: bool) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs, (out,) = equation.invars[0].aval, equation.outvars
    return math.prod(out.aval.shape) * math.prod(lhs.shape[axis] for axis in contracted)


def _of_ragged_dot(equation: JaxprEqn, _: bool) -> int:
    """Each element on the left meets those of one group on the right."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    lhs, rhs = (each.aval.shape for each in equation.invars[:2])
    met = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return math.prod(lhs) * math.prod(size for axis, size in enumerate(rhs) if axis not in met)


def _of_convolution(equation: JaxprEqn, backward: bool) -> int:
    """Every element of the kernel meets every output, whether it lies on padding or not.

    So a convolution's derivatives count as much as it does. A convolution with a dilated input, as
    a transposed one, does not multiply the zeros in between, and a backward pass not those around.
    """
    params = equation.params
    numbers = params["dimension_numbers"]
    lhs, rhs = (each.aval.shape for each in equation.invars)
    (out,) = (each.aval.shape for each in equation.outvars)
    (_, _, *lhs_axes), (_, inputs, *rhs_axes) = numbers.lhs_spec, numbers.rhs_spec
    images, outputs, *out_axes = numbers.out_spec
    total = out[images] * out[outputs] * rhs[inputs]
    axes = zip(lhs_axes, rhs_axes, out_axes, params["lhs_dilation"], strict=True)
    for lhs_axis, rhs_axis, out_axis, dilation in axes:
        left, right, result = lhs[lhs_axis], rhs[rhs_axis], out[out_axis]
        # Of input, kernel and output two positions determine the third.
        if dilation > 1:
            total *= min(left * right, result * right, left * result)
        else:
            total *= min(left, result) * right if backward else result * right
    return total


FORMULAS: dict[str, Callable[[JaxprEqn, bool], int]] = {
    "dot_general": _of_dot,
    "ragged_dot_general": _of_ragged_dot,
    "conv_general_dilated": _of_convolution,
}
"""The multiply-adds of a primitive, by its equation and whether that is of a backward pass."""
