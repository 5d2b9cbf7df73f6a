"""The ordinary, dense convolution of NHWC arrays, in two lowerings."""

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike
from jax import lax

from chansel_jax.ops import native
from chansel_jax.ops.lowerings import checked_lowering, fastest_dense
from chansel_jax.ops.window import Padding, Window

LOWERINGS = ("auto", "lax", "native")


def dense_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, int] = 1,
    lowering: str = "auto",
    precision: PrecisionLike = None,
) -> jax.Array:
    """Convolves `x` `(N, H, W, C_in)` with `kernel` `(K_h, K_w, C_in, C_out)` of the same dtype.

    The lowerings compute the same, up to rounding:

    - `"lax"`: `jax.lax.conv_general_dilated`, which can be differentiated in any way.
    - `"native"`: C++, on CPUs (`chansel_jax.ops.native`): `jax.grad` and `jax.vjp`, once.
    - `"auto"`: the faster, by the rules of `chansel_jax.ops.lowerings`.

    Args:
        x: the input.
        kernel: the kernel.
        strides: steps between outputs in rows and columns. Default 1.
        padding: as `chansel_jax.ops.window.padding_spec` has it. Default `"SAME"`.
        dilation: distance between a kernel's elements in rows and columns. Default 1.
        lowering: one of `LOWERINGS`. Default `"auto"`.
        precision: `jax.lax.Precision` of the products; `"native"` never rounds the factors.

    Returns:
        `(N, H_out, W_out, C_out)`, of the dtype of `x`.

    Raises:
        ValueError: if an argument is wrong, the shapes do not fit each other, the padded input is
            smaller than the kernel, or `lowering="native"` is not available.
        TypeError: if the dtypes differ, or for derivatives that the lowering does not have.
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
    """`dense_conv` in a window that is parsed already."""
    fits = x.ndim == kernel.ndim == 4 and x.shape[-1] == kernel.shape[2]
    check(x, kernel, window, fits, "(N, H, W, C_in) and (K_h, K_w, C_in, C_out)")
    if checked_lowering(lowering, LOWERINGS) == "auto":
        lowering = fastest_dense(kernel)
    if lowering == "native":
        return native.dense_conv(x, kernel, window)
    return lax_conv(x, kernel, window, precision)


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
    window.output_size(x.shape[1:3], kernel.shape[:2])  # raises where there is no output


def lax_conv(
    x: jax.Array, kernel: jax.Array, window: Window, precision: PrecisionLike, groups: int = 1
) -> jax.Array:
    """The convolution of `jax.lax`, of channels in `groups`."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=window.strides,
        padding=window.padding_pairs(x.shape[1:3], kernel.shape[:2]),
        rhs_dilation=window.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=precision,
    )
