"""The depthwise part of channel selection, in several lowerings of one function."""

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike
from jax import lax

from chansel_jax.ops.dense import DIMENSIONS
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
        strides: steps between outputs in rows and columns. Default 1.
        padding: `"SAME"` (the default), `"VALID"`, an integer, or `((top, bottom), (left, right))`.
        dilation: distance between a kernel's elements in rows and columns. Default 1.
        lowering: one of `LOWERINGS`. Default `"auto"`.
        precision: `jax.lax.Precision` of the products of `"grouped"`. It has no meaning for the
            elementwise products of `"shifted"`, which are always exact to the dtype.

    Returns:
        `(N, H_out, W_out, C_out)`, of the dtype of `x`.

    Raises:
        ValueError: if an argument is wrong or the shapes do not fit each other, or if the padded
            input is smaller than the dilated kernel.
        TypeError: if the dtypes of `x` and `kernel` differ.
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
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[-1] != kernel.shape[2] * kernel.shape[3]:
        raise ValueError(
            f"x of shape {x.shape} and kernel of shape {kernel.shape} must be (N, H, W, C_out·R) "
            "and (K_h, K_w, R, C_out)"
        )
    if 0 in kernel.shape:
        raise ValueError(f"every size of kernel of shape {kernel.shape} must be at least 1")
    if x.dtype != kernel.dtype:
        raise TypeError(f"x of dtype {x.dtype} and kernel of dtype {kernel.dtype} must be alike")
    window.output_size(x.shape[1:3], kernel.shape[:2])  # raises where there is no output
    if checked_lowering(lowering, LOWERINGS) == "auto":
        lowering = fastest_depthwise()
    if lowering == "shifted":
        return depthwise_shifted(x, kernel, window)
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=window.strides,
        padding=window.padding_pairs(x.shape[1:3], kernel.shape[:2]),
        rhs_dilation=window.dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=kernel.shape[3],
        precision=precision,
    )
