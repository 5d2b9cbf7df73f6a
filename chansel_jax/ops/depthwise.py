"""The depthwise part of channel selection, in several lowerings of one function."""

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike

from chansel_jax.ops import dense
from chansel_jax.ops.lowerings import checked_lowering, fastest_depthwise
from chansel_jax.ops.shifted import depthwise_shifted
from chansel_jax.ops.window import Padding, Window

LOWERINGS = ("auto", "grouped", "shifted")


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, int] = 1,
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
      `lowering="grouped"` for them.
    - `"auto"` (the default): the fastest, by the rules of `chansel_jax.ops.lowerings`.

    Args:
        x: `(N, H, W, C_out·R)`; channels `o·R … o·R + R - 1` belong to output channel `o`.
        kernel: `(K_h, K_w, R, C_out)`, of the dtype of `x`.
        strides: as `padding` and `dilation`, that of `chansel_jax.ops.dense.dense_conv`.
        lowering: one of `LOWERINGS`. Default `"auto"`.
        precision: `jax.lax.Precision` of the products of `"grouped"`. It has no meaning for the
            elementwise products of `"shifted"`, which are always exact to the dtype.

    Returns:
        `(N, H_out, W_out, C_out)`, of the dtype of `x`.

    Raises:
        ValueError: as `dense_conv` does.
        TypeError: likewise.
    """
    window = Window.of(strides, padding, dilation)
    return convolve(jnp.asarray(x), jnp.asarray(kernel), window, lowering, precision)


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    window: Window,
    lowering: str = "auto",
    precision: PrecisionLike = None,
) -> jax.Array:
    """`depthwise_conv` in a window that is parsed already."""
    fits = x.ndim == kernel.ndim == 4 and x.shape[-1] == kernel.shape[2] * kernel.shape[3]
    dense.check(x, kernel, window, fits, "(N, H, W, C_out·R) and (K_h, K_w, R, C_out)")
    if checked_lowering(lowering, LOWERINGS) == "auto":
        lowering = fastest_depthwise()
    if lowering == "shifted":
        return depthwise_shifted(x, kernel, window)
    return dense.lax_conv(x, kernel, window, precision, groups=kernel.shape[3])
