"""The ordinary, dense convolution of channels-last arrays, in two lowerings."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike
from jax import lax

from chansel_jax.ops import late, native
from chansel_jax.ops.limits import DEFAULT, Options, able, first_able
from chansel_jax.ops.lowerings import ANYWHERE, Place, fastest_dense
from chansel_jax.ops.window import Padding, Window

LOWERINGS = ("auto", "lax", "native")


def dense_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    lowering: str = "auto",
    precision: PrecisionLike = None,
) -> jax.Array:
    """Convolves `x` `(N, *spatial, C_in)` with a `kernel` `(*kernel_size, C_in, C_out)`.

    The lowerings compute the same, up to rounding:

    - `"lax"`: `jax.lax.conv_general_dilated`, which can be differentiated in any way.
    - `"native"`: C++, on CPUs (`chansel_jax.ops.native`): all derivatives. It has
      one and two dimensions, and no negative padding.
    - `"auto"`: the faster, by the rules of `chansel_jax.ops.lowerings`; what `"native"` does not
      have, `"lax"` computes.

    Args:
        x: the input, with as many spatial axes as the kernel.
        kernel: the kernel, of the dtype of `x`.
        strides: steps between outputs; here and below, an integer stands for all spatial axes.
            Default 1.
        padding: as `chansel_jax.ops.window.padding_spec` has it. Default `"SAME"`.
        dilation: distance between a kernel's elements. Default 1.
        lowering: one of `LOWERINGS`. Default `"auto"`.
        precision: `jax.lax.Precision` of the products; `"native"` never rounds the factors.

    Returns:
        `(N, *spatial_out, C_out)`, of the dtype of `x`.

    Raises:
        ValueError: if an argument is wrong, the shapes do not fit each other, the padded input is
            smaller than the kernel, or `lowering="native"` is not available or lacks something.
        TypeError: if the dtypes differ.
    """
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)
    window = Window.of(strides, padding, dilation, dimensions=max(1, kernel.ndim - 2))
    return convolve(x, kernel, window, lowering, Options(precision=precision))


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    window: Window,
    lowering: str = "auto",
    options: Options = DEFAULT,
) -> jax.Array:
    """`dense_conv` in a window that is parsed already; `kernel` `(*kernel_size, C_in/G, C_out)`."""
    fits = x.ndim == kernel.ndim == window.dimensions + 2 and (
        x.shape[-1] == kernel.shape[-2] * options.groups and kernel.shape[-1] % options.groups == 0
    )
    check(x, kernel, window, fits, "(N, *spatial, C_in) and (*kernel_size, C_in, C_out)")
    lowering = able(lowering, LOWERINGS, window, options)
    x, window = window.padded_first(x, kernel.shape[:-2])
    if late.needs_lax(options, x, kernel):
        lowering = late.without_late(lowering, "lax")
    if lowering == "lax":
        return lax_conv(x, kernel, window, options)
    return late.call(late.Function(compute, _choose, window, lowering, options), x, kernel)


def compute(function: late.Function, lowering: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """What `function` asks for, by the lowering `"lax"` or `"native"`."""
    window = function.window
    if lowering == "lax":
        return lax_conv(x, kernel, window, function.options)
    if window.dimensions == 1:
        return native.dense_conv(x[:, None], kernel[None], window.with_rows())[:, 0]
    return native.dense_conv(x, kernel, window, function.moments)


def _choose(function: late.Function, place: Place, _: jax.Array, kernel: jax.Array) -> str:
    if place == ANYWHERE:
        return "lax"
    if function.lowering != "auto":
        return function.lowering
    return fastest(place, kernel, function.window, function.options)


def fastest(place: Place, kernel: jax.Array, window: Window, options: Options = DEFAULT) -> str:
    """What `"auto"` takes: the faster lowering, or `"lax"` where that one lacks something."""
    return first_able((fastest_dense(place, kernel), "lax"), window, options)


def check(x: jax.Array, kernel: jax.Array, window: Window, fits: bool, shapes: str) -> None:
    """Raises what `dense_conv` does, for a kernel whose shape `fits`, or should be as `shapes`."""
    if not fits:
        raise ValueError(
            f"x of shape {x.shape} and kernel of shape {kernel.shape} must be {shapes}"
        )
    if 0 in kernel.shape:
        raise ValueError(f"every size of kernel of shape {kernel.shape} must be at least 1")
    if x.dtype != kernel.dtype:
        raise TypeError(f"x of dtype {x.dtype} and kernel of dtype {kernel.dtype} must be alike")
    window.output_size(x.shape[1:-1], kernel.shape[:-2])  # raises where there is no output


def lax_conv(
    x: jax.Array,
    kernel: jax.Array,
    window: Window,
    options: Options,
    conv_general_dilated: Callable[..., jax.Array] = lax.conv_general_dilated,
) -> jax.Array:
    """The convolution of `jax.lax`, or a function that is called alike, as `nnx.Conv` calls it."""
    last, spatial = x.ndim - 1, tuple(range(1, x.ndim - 1))
    lhs, rhs = (0, last, *spatial), (last, last - 1, *range(last - 1))
    # Only if it is given: a function of the user's need not know it.
    preferred = {"preferred_element_type": options.preferred_element_type}
    return conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        lhs_dilation=window.input_dilation,
        rhs_dilation=window.dilation,
        dimension_numbers=lax.ConvDimensionNumbers(lhs, rhs, lhs),
        feature_group_count=options.groups,
        precision=options.precision,
        out_sharding=options.out_sharding,
        **(preferred if options.preferred_element_type is not None else {}),
    )
