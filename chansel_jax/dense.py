"""The ordinary, dense convolution of NHWC arrays."""

import jax
from flax.typing import PrecisionLike
from jax import lax

from chansel_jax.window import Padding, output_size, padding_pairs, pair

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def dense_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, int] = 1,
    precision: PrecisionLike = None,
) -> jax.Array:
    """Convolves `x` `(N, H, W, C_in)` with `kernel` `(K_h, K_w, C_in, C_out)` of the same dtype.

    Args:
        x: the input.
        kernel: the kernel.
        strides: steps between outputs in rows and columns. Default 1.
        padding: as `chansel_jax.window.padding_spec` has it. Default `"SAME"`.
        dilation: distance between a kernel's elements in rows and columns. Default 1.
        precision: `jax.lax.Precision` of the products.

    Returns:
        `(N, H_out, W_out, C_out)`, of the dtype of `x`.

    Raises:
        ValueError: if a window's argument is wrong, or the padded input smaller than the kernel.
    """
    strides, dilation = pair("strides", strides), pair("dilation", dilation)
    size, kernel_size = x.shape[1:3], kernel.shape[:2]
    output_size(size, kernel_size, strides, padding, dilation)  # raises where there is no output
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=padding_pairs(padding, size, kernel_size, strides, dilation),
        rhs_dilation=dilation,
        dimension_numbers=DIMENSIONS,
        precision=precision,
    )
