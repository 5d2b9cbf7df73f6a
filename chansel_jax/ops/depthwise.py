"""The depthwise part of channel selection, in several lowerings of one function."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike

from chansel_jax.ops import dense, late
from chansel_jax.ops.limits import DEFAULT, Options, able, first_able
from chansel_jax.ops.lowerings import Place, fastest_depthwise
from chansel_jax.ops.shifted import depthwise_shifted
from chansel_jax.ops.window import Padding, Window

LOWERINGS = ("auto", "grouped", "shifted")


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    lowering: str = "auto",
    precision: PrecisionLike = None,
) -> jax.Array:
    """Convolves each group of R channels with its own kernel and adds within the group.

    The lowerings compute the same function and differ in speed and in what they support:

    - `"grouped"`: a feature-grouped `lax.conv_general_dilated`. Anything JAX can do with a
      convolution works. Slow on CPUs, its gradients very slow in the body of a loop there.
    - `"shifted"`: a sum of shifted multiply-adds without any convolution, forward and backward.
      It adds in float32 where `x` is of 16 bits. Reverse-mode gradients of any order work, first
      ones at full speed, and `jax.hessian` does. `jax.jvp`, `jax.jacfwd` and the function that
      `jax.linearize` returns raise JAX's `TypeError` about a `custom_vjp`: take
      `lowering="grouped"` for them. It has one and two dimensions, and no negative padding.
    - `"auto"` (the default): the fastest, by the rules of `chansel_jax.ops.lowerings`; what
      `"shifted"` does not have, `"grouped"` computes.

    Args:
        x: `(N, *spatial, C_out·R)`; channels `o·R … o·R + R - 1` belong to output channel `o`.
        kernel: `(*kernel_size, R, C_out)`, of the dtype of `x`.
        strides: as `padding` and `dilation`, that of `chansel_jax.ops.dense.dense_conv`.
        lowering: one of `LOWERINGS`. Default `"auto"`.
        precision: `jax.lax.Precision` of the products of `"grouped"`. It has no meaning for the
            elementwise products of `"shifted"`, which are always exact to the dtype.

    Returns:
        `(N, *spatial_out, C_out)`, of the dtype of `x`.

    Raises:
        ValueError: as `dense_conv` does.
        TypeError: likewise.
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
    """`depthwise_conv` in a window that is parsed already.

    The groups of `options` are of the weighted sums and have no meaning here.
    """
    fits = x.ndim == kernel.ndim == window.dimensions + 2 and (
        x.shape[-1] == kernel.shape[-2] * kernel.shape[-1]
    )
    dense.check(x, kernel, window, fits, "(N, *spatial, C_out·R) and (*kernel_size, R, C_out)")
    lowering = able(lowering, LOWERINGS, window, options)
    x, window = window.padded_first(x, kernel.shape[:-2])
    function = late.Function(_compute, _choose, window, lowering, options)
    if lowering != "auto":
        return _compute(function, lowering, x, kernel)
    if late.needs_lax(options, x, kernel):
        return _compute(function, "grouped", x, kernel)
    return late.call(function, x, kernel)


def _compute(function: late.Function, lowering: str, x: jax.Array, kernel: jax.Array) -> jax.Array:
    window, options = function.window, function.options
    if lowering == "grouped":
        return dense.lax_conv(x, kernel, window, options._replace(groups=kernel.shape[-1]))
    if window.dimensions == 1:
        return depthwise_shifted(x[:, None], kernel[None], window.with_rows())[:, 0]
    return depthwise_shifted(x, kernel, window)


def _choose(function: late.Function, place: Place, x: jax.Array, _: jax.Array) -> str:
    return fastest(place, x, function.window, function.options)


def fastest(place: Place, x: jax.Array, window: Window, options: Options = DEFAULT) -> str:
    """What `"auto"` takes: the fastest lowering, or `"grouped"` where that one lacks something."""
    return first_able((fastest_depthwise(place, x), "grouped"), window, options)
