"""The depthwise part of channel selection."""

import jax
from flax.typing import PrecisionLike
from jax import lax

from chansel_jax.window import Padding, padding_spec, pair

DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def depthwise_conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, int] = 1,
    precision: PrecisionLike = None,
) -> jax.Array:
    """Convolves each group of R channels with its own kernel and adds within the group.

    Args:
        x: `(N, H, W, C_out·R)`; channels `o·R … o·R + R - 1` belong to output channel `o`.
        kernel: `(K_h, K_w, R, C_out)`, of the dtype of `x`.
        strides: steps between outputs in rows and columns. Default 1.
        padding: `"SAME"` (the default), `"VALID"`, an integer, or `((top, bottom), (left, right))`.
        dilation: distance between a kernel's elements in rows and columns. Default 1.
        precision: `jax.lax.Precision` of the products.

    Returns:
        `(N, H_out, W_out, C_out)`, of the dtype of `x`.

    Raises:
        ValueError: if an argument is wrong or the shapes do not fit each other.
    """
    if x.ndim != 4 or kernel.ndim != 4 or x.shape[-1] != kernel.shape[2] * kernel.shape[3]:
        raise ValueError(
            f"x of shape {x.shape} and kernel of shape {kernel.shape} must be (N, H, W, C_out·R) "
            "and (K_h, K_w, R, C_out)"
        )
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=pair("strides", strides),
        padding=padding_spec(padding),
        rhs_dilation=pair("dilation", dilation),
        dimension_numbers=DIMENSIONS,
        feature_group_count=kernel.shape[3],
        precision=precision,
    )
