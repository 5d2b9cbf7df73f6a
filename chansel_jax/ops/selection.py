"""Channel selection as a function of arrays, and its lowerings."""

import jax
import jax.numpy as jnp
from flax.typing import PrecisionLike
from jax import lax

from chansel_jax.ops import dense, native
from chansel_jax.ops import depthwise as depthwise_part
from chansel_jax.ops.lowerings import checked_lowering, fastest_layer
from chansel_jax.ops.window import Padding, Window

LOWERINGS = ("auto", "composed", "grouped", "shifted", "native", "composed_native")


def channel_selection(
    x: jax.Array,
    pointwise: jax.Array,
    depthwise: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, int] = 1,
    lowering: str = "auto",
    precision: PrecisionLike = None,
) -> jax.Array:
    """Weighted sums over the input channels, each convolved with a kernel of its own.

    All lowerings compute the same, up to rounding:

    - `"composed"`: one dense convolution with `composed_kernel(pointwise, depthwise)`.
    - `"grouped"`, `"shifted"`: a product over channels, then `depthwise_conv` in that lowering.
    - `"native"`: both at once in C++, on CPUs (`chansel_jax.ops.native`).
    - `"composed_native"`: as `"composed"`, its dense convolution in C++.
    - `"auto"`: the fastest of them, by the rules of `chansel_jax.ops.lowerings`.

    `"composed"` and `"grouped"` can be differentiated in any way; `"shifted"` in reverse mode
    (`jax.grad`, `jax.vjp`) any number of times, what is in C++ once; neither by `jax.jvp`.

    Args:
        x: `(N, H, W, C_in)`.
        pointwise: `(C_in, C_out·R)`, output channel `o` owns the columns `o·R … o·R + R - 1`.
        depthwise: `(K_h, K_w, R, C_out)`. Both kernels are brought to the dtype of `x`.
        strides: as `padding` and `dilation`, that of `chansel_jax.ops.dense.dense_conv`.
        lowering: one of `LOWERINGS`. Default `"auto"`.
        precision: `jax.lax.Precision` of the products; what is in C++, and the depthwise part of
            `"shifted"`, never round the factors.

    Returns:
        `(N, H_out, W_out, C_out)`, of the dtype of `x`.

    Raises:
        ValueError: if an argument is wrong, the shapes do not fit each other, or
            the lowering is in C++, which is not available.
        TypeError: for derivatives that the lowering does not have.
    """
    operands = map(jnp.asarray, (x, pointwise, depthwise))
    return select(*operands, Window.of(strides, padding, dilation), lowering, precision)


def select(
    x: jax.Array,
    pointwise: jax.Array,
    depthwise: jax.Array,
    window: Window,
    lowering: str = "auto",
    precision: PrecisionLike = None,
) -> jax.Array:
    """`channel_selection` in a window that is parsed already."""
    fits = x.ndim == depthwise.ndim == 4
    if not fits or pointwise.shape != (x.shape[-1], depthwise.shape[2] * depthwise.shape[3]):
        raise ValueError(
            f"x of shape {x.shape}, pointwise of shape {pointwise.shape} and depthwise of shape "
            f"{depthwise.shape} must be (N, H, W, C_in), (C_in, C_out·R) and (K_h, K_w, R, C_out)"
        )
    if 0 in (*pointwise.shape, *depthwise.shape):
        raise ValueError(
            f"every size of pointwise of shape {pointwise.shape} and depthwise of shape "
            f"{depthwise.shape} must be at least 1"
        )
    if checked_lowering(lowering, LOWERINGS) == "auto":
        lowering = fastest_layer(x, depthwise)
    if lowering in ("composed", "composed_native"):
        kernel = composed_kernel(pointwise, depthwise).astype(x.dtype)
        in_dense = "lax" if lowering == "composed" else "native"
        return dense.convolve(x, kernel, window, in_dense, precision)
    pointwise, depthwise = pointwise.astype(x.dtype), depthwise.astype(x.dtype)
    if lowering == "native":
        return native.channel_selection(x, pointwise, depthwise, window)
    sums = weighted_sums(x, pointwise, precision)
    return depthwise_part.convolve(sums, depthwise, window, lowering, precision)


def weighted_sums(x: jax.Array, pointwise: jax.Array, precision: PrecisionLike = None) -> jax.Array:
    """The pointwise part: `(N, H, W, C_in)` and `(C_in, M)` to `(N, H, W, M)`.

    One product of two matrices: XLA:CPU computes the gradient of `pointwise` some three times
    faster than that of a four-dimensional product.
    """
    sums = jnp.dot(x.reshape(-1, x.shape[-1]), pointwise, precision=precision)
    return sums.reshape(*x.shape[:-1], pointwise.shape[1])


def composed_kernel(pointwise: jax.Array, depthwise: jax.Array) -> jax.Array:
    """The dense kernel `(K_h, K_w, C_in, C_out)` that computes the same function.

    Args:
        pointwise: `(C_in, C_out·R)`.
        depthwise: `(K_h, K_w, R, C_out)`.
    """
    _, _, rank, out_channels = depthwise.shape
    return jnp.einsum(
        "ior,hwro->hwio",
        pointwise.reshape(-1, out_channels, rank),
        depthwise,
        precision=lax.Precision.HIGHEST,
    )
