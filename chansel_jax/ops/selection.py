"""Channel selection as a function of arrays, and its lowerings."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike
from jax import lax

from chansel_jax.ops import dense, late, native
from chansel_jax.ops import depthwise as depthwise_part
from chansel_jax.ops.limits import DEFAULT, Options, able, first_able
from chansel_jax.ops.lowerings import ANYWHERE, Place, defining, fastest_layer
from chansel_jax.ops.window import Padding, Window

LATE = ("auto", "native", "composed_native")  # whose lowering is chosen when a program is compiled
IN_TWO_PARTS = ("grouped", "shifted")
LOWERINGS = ("auto", "composed", "grouped", "shifted", "native", "composed_native")


def channel_selection(
    x: jax.Array,
    pointwise: jax.Array,
    depthwise: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    lowering: str = "auto",
    precision: PrecisionLike = None,
) -> jax.Array:
    """Weighted sums over the input channels, each convolved with a kernel of its own.

    All lowerings compute the same, up to rounding:

    - `"composed"`: one dense convolution with `composed_kernel(pointwise, depthwise)`.
    - `"grouped"`, `"shifted"`: a product over channels, then `depthwise_conv` in that lowering.
    - `"native"`: both at once in C++, on CPUs (`chansel_jax.ops.native`).
    - `"composed_native"`: as `"composed"`, its dense convolution in C++.
    - `"auto"`: the fastest of them, by the rules of `chansel_jax.ops.lowerings`; what it does not
      have, `"shifted"` or `"composed"` computes.

    `"composed"` and `"grouped"` have any number of dimensions and negative padding, the others one
    and two dimensions.

    All can be differentiated in any way. Only `"shifted"`, if it is asked for by name, has no
    forward mode (`jax.jvp`); it can be differentiated in reverse mode any number of times.

    Args:
        x: `(N, *spatial, C_in)`.
        pointwise: `(C_in, C_out·R)`, output channel `o` owns the columns `o·R … o·R + R - 1`.
        depthwise: `(*kernel_size, R, C_out)`. Both kernels are brought to the dtype of `x`.
        strides: as `padding` and `dilation`, that of `chansel_jax.ops.dense.dense_conv`.
        lowering: one of `LOWERINGS`. Default `"auto"`.
        precision: `jax.lax.Precision` of the products; what is in C++, and the depthwise part of
            `"shifted"`, never round the factors.

    Returns:
        `(N, *spatial_out, C_out)`, of the dtype of `x`.

    Raises:
        ValueError: if an argument is wrong, the shapes do not fit each other, or
            the lowering lacks something or is in C++, which is not available.
        TypeError: for derivatives that the lowering does not have.
    """
    x, pointwise, depthwise = map(jnp.asarray, (x, pointwise, depthwise))
    window = Window.of(strides, padding, dilation, dimensions=max(1, depthwise.ndim - 2))
    return select(x, pointwise, depthwise, window, lowering, Options(precision=precision))


def select(
    x: jax.Array,
    pointwise: jax.Array,
    depthwise: jax.Array,
    window: Window,
    lowering: str = "auto",
    options: Options = DEFAULT,
) -> jax.Array:
    """`channel_selection` in a window that is parsed already; `pointwise` `(C_in/G, C_out·R)`."""
    _check(x, pointwise, depthwise, window, options)
    lowering = able(lowering, LOWERINGS, window, options)
    if late.needs_lax(options, x, pointwise, depthwise):
        lowering = late.without_late(lowering, "composed")
    if lowering not in IN_TWO_PARTS:  # whose depthwise part pads
        x, window = window.padded_first(x, depthwise.shape[:-2])
    operands = x, pointwise, depthwise
    function = late.Function(_compute, _choose, window, lowering, options)
    if lowering in LATE:
        return late.call(function, *operands)
    return _compute(function, lowering, *operands)


def _compute(
    function: late.Function, lowering: str, x: jax.Array, pointwise: jax.Array, depthwise: jax.Array
) -> jax.Array:
    window, options = function.window, function.options
    if lowering in ("composed", "composed_native"):
        dtype = jnp.promote_types(x.dtype, pointwise.dtype)  # composed before it is rounded
        kernel = composed_kernel(pointwise.astype(dtype), depthwise.astype(dtype)).astype(x.dtype)
        in_dense = "lax" if lowering == "composed" else "native"
        return dense.compute(function, in_dense, x, kernel)
    pointwise, depthwise = pointwise.astype(x.dtype), depthwise.astype(x.dtype)
    if lowering == "native":
        if window.dimensions == 1:
            rows = x[:, None], pointwise, depthwise[None], window.with_rows()
            return native.channel_selection(*rows)[:, 0]
        return native.channel_selection(x, pointwise, depthwise, window, function.moments)
    sums = weighted_sums(x, pointwise, options)
    return depthwise_part.convolve(sums, depthwise, window, lowering, options)


def _choose(
    function: late.Function, place: Place, x: jax.Array, _: jax.Array, depthwise: jax.Array
) -> str:
    if place == ANYWHERE:
        return defining(LOWERINGS) or "composed"
    if function.lowering != "auto":
        return function.lowering
    return fastest(place, x, depthwise, function.window, function.options)


def fastest(
    place: Place, x: jax.Array, depthwise: jax.Array, window: Window, options: Options = DEFAULT
) -> str:
    """What `"auto"` takes: the fastest lowering, or another where that one lacks something."""
    return first_able((fastest_layer(place, x, depthwise), "shifted", "composed"), window, options)


def _check(
    x: jax.Array, pointwise: jax.Array, depthwise: jax.Array, window: Window, options: Options
) -> None:
    fits = x.ndim == depthwise.ndim == window.dimensions + 2 and (
        pointwise.shape
        == (x.shape[-1] // options.groups, depthwise.shape[-2] * depthwise.shape[-1])
        and x.shape[-1] % options.groups == depthwise.shape[-1] % options.groups == 0
    )
    if not fits:
        raise ValueError(
            f"x of shape {x.shape}, pointwise of shape {pointwise.shape} and depthwise of shape "
            f"{depthwise.shape} must be (N, *spatial, C_in), (C_in, C_out·R) and "
            "(*kernel_size, R, C_out)"
        )
    if 0 in (*pointwise.shape, *depthwise.shape):
        raise ValueError(
            f"every size of pointwise of shape {pointwise.shape} and depthwise of shape "
            f"{depthwise.shape} must be at least 1"
        )
    window.output_size(x.shape[1:-1], depthwise.shape[:-2])  # raises where there is no output


def weighted_sums(x: jax.Array, pointwise: jax.Array, options: Options = DEFAULT) -> jax.Array:
    """The pointwise part: `(N, *spatial, C_in)` and `(C_in/G, M)` to `(N, *spatial, M)`.

    One product of two matrices, or of G pairs of them: XLA:CPU computes the gradient of `pointwise`
    some three times faster than that of a four-dimensional product.
    """
    pixels = x.reshape(-1, x.shape[-1])
    if options.groups == 1:
        sums = jnp.dot(pixels, pointwise, precision=options.precision)
    else:
        sums = jnp.einsum(
            "pgi,igo->pgo",
            pixels.reshape(-1, options.groups, pointwise.shape[0]),
            pointwise.reshape(pointwise.shape[0], options.groups, -1),
            precision=options.precision,
        )
    return sums.reshape(*x.shape[:-1], pointwise.shape[1])


def composed_kernel(pointwise: jax.Array, depthwise: jax.Array) -> jax.Array:
    """The dense kernel `(*kernel_size, C_in, C_out)` that computes the same function.

    Args:
        pointwise: `(C_in, C_out·R)`.
        depthwise: `(*kernel_size, R, C_out)`.
    """
    rank, out_channels = depthwise.shape[-2:]
    return jnp.einsum(
        "ior,...ro->...io",
        pointwise.reshape(-1, out_channels, rank),
        depthwise,
        precision=lax.Precision.HIGHEST,
    )
