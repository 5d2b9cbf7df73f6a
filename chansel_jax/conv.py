"""Convolution layers: the ordinary dense one and channel selection.

Both are `flax.nnx` modules called alike, so that a network takes either as an argument. Arrays are
NHWC, kernels HWIO.
"""

import collections
import functools
import math
import reprlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype, Initializer, PrecisionLike

from chansel_jax.ops import dense, depthwise
from chansel_jax.ops.lowerings import (
    checked_lowering,
    fastest_dense,
    fastest_depthwise,
    fastest_layer,
)
from chansel_jax.ops.selection import LOWERINGS, composed_kernel, select, weighted_sums
from chansel_jax.ops.window import Padding, Window, padding_spec, pair, positive

he_normal = nnx.initializers.he_normal()
lecun_normal = nnx.initializers.lecun_normal()
zeros = nnx.initializers.zeros_init()

BatchNorm = functools.partial(nnx.BatchNorm, momentum=0.9)  # PyTorch writes this momentum as 0.1


class SubKernelConv(nnx.Module):
    """The dense convolution: a K_h × K_w kernel for every pair of input and output channel.

    Parameters: `kernel` `(K_h, K_w, C_in, C_out)` and, with `use_bias`, `bias` `(C_out,)`.

    The arguments, with their defaults, are those of `ChannelSelectionConv`, but for these:

    Args:
        kernel_init: initialiser of `kernel`; He's normal one by default.
        lowering: how it is computed, one of `SubKernelConv.LOWERINGS`; see
            `chansel_jax.ops.dense.dense_conv`. Default `"auto"`, the fastest.

    Raises:
        ValueError: naming the argument that is wrong, and its value.
    """

    LOWERINGS: ClassVar[tuple[str, ...]] = dense.LOWERINGS

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        strides: int | tuple[int, int] = 1,
        padding: Padding = "SAME",
        kernel_dilation: int | tuple[int, int] = 1,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = he_normal,
        bias_init: Initializer = zeros,
        lowering: str = "auto",
        rngs: nnx.Rngs,
    ):
        self.in_channels = positive("in_channels", in_channels)
        self.out_channels = positive("out_channels", out_channels)
        self.kernel_size = pair("kernel_size", kernel_size)
        self.window = Window(
            pair("strides", strides),
            padding_spec(padding),
            pair("kernel_dilation", kernel_dilation),
        )
        self.lowering = checked_lowering(lowering, dense.LOWERINGS)
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        self.bias = _bias(use_bias, bias_init, self.out_channels, param_dtype, rngs)
        shape = (*self.kernel_size, self.in_channels, self.out_channels)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves `x` `(*batch, H, W, C_in)` to `(*batch, H_out, W_out, C_out)`.

        Raises:
            ValueError: if `x` is no array of numbers, its shape does not fit, or its images have no
                pixels or are smaller than the kernel.
        """
        images = _images(self, x)
        kernel = self.kernel[...].astype(images.dtype)
        y = dense.convolve(images, kernel, self.window, self.lowering, self.precision)
        return _with_bias(self, y).reshape(*x.shape[:-3], *y.shape[1:])


class ChannelSelectionConv(nnx.Module):
    """Channel selection: a weighted sum over the input channels, then one kernel, per output.

    Every output channel learns R weighted sums of the input channels (the pointwise part) and a
    K_h × K_w kernel for each of them (the depthwise part), which are added. With R = 1 this is the
    BSConv-U of Haase and Amthor, "Rethinking Depthwise Separable Convolutions" (CVPR 2020); sums of
    R of them are those of Guo et al., "Network Decoupling" (2018), and R = min(C_in, K_h·K_w) can
    express every dense convolution.

    Parameters, where output channel `o` owns the columns `o·R … o·R + R - 1` of `pointwise`:

    - `pointwise` `(C_in, C_out·R)`
    - `depthwise` `(K_h, K_w, R, C_out)`
    - `bias` `(C_out,)`, with `use_bias`
    - `norm.scale`, `norm.bias` `(C_out·R,)`, with `norm`

    The default initialisers give the composed kernel the variance of He's initialisation of a
    dense one, 2 / (C_in·K_h·K_w): 1 / C_in for `pointwise`, 2 / (K_h·K_w·R) for `depthwise`.

    Args:
        in_channels: C_in, the channels of the input.
        out_channels: C_out, the channels of the output.
        kernel_size: K_h and K_w; here and below, an integer stands for rows and columns.
        strides: steps between outputs. Default 1.
        padding: `"SAME"` (the default), `"VALID"`, an integer, or `((top, bottom), (left, right))`.
            PyTorch's `padding=1` is `1` here; it differs from `"SAME"` where the stride is 2.
        kernel_dilation: distance between a kernel's elements. Default 1.
        use_bias: whether to add a bias to the output. Default True.
        dtype: that of the computation; by default what input and parameters promote to.
        param_dtype: that of the parameters. Default float32.
        precision: `jax.lax.Precision` of the products.
        kernel_init: initialiser of both parts where the next two are not given.
        bias_init: initialiser of `bias`; zeros by default.
        rank: R, from 1 (the default) to min(C_in, K_h·K_w).
        pointwise_init: initialiser of `pointwise`; LeCun's normal one by default.
        depthwise_init: initialiser of `depthwise`; He's normal one by default.
        norm: whether BatchNorm normalises the weighted sums. Default False.
        lowering: how it is computed, one of `ChannelSelectionConv.LOWERINGS`; see
            `chansel_jax.ops.selection.channel_selection`. Default `"auto"`, the fastest; with
            `norm` there are only `"auto"`, `"grouped"` and `"shifted"`.
        rngs: the stream `params` initialises the parameters.

    Raises:
        ValueError: naming the argument that is wrong, and its value.
    """

    LOWERINGS: ClassVar[tuple[str, ...]] = LOWERINGS

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        *,
        strides: int | tuple[int, int] = 1,
        padding: Padding = "SAME",
        kernel_dilation: int | tuple[int, int] = 1,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer | None = None,
        bias_init: Initializer = zeros,
        rank: int = 1,
        pointwise_init: Initializer | None = None,
        depthwise_init: Initializer | None = None,
        norm: bool = False,
        lowering: str = "auto",
        rngs: nnx.Rngs,
    ):
        self.in_channels = positive("in_channels", in_channels)
        self.out_channels = positive("out_channels", out_channels)
        self.kernel_size = pair("kernel_size", kernel_size)
        self.window = Window(
            pair("strides", strides),
            padding_spec(padding),
            pair("kernel_dilation", kernel_dilation),
        )
        self.rank = _checked_rank(rank, self.in_channels, self.kernel_size)
        self.lowering = _lowering_with(norm, lowering)
        self.dtype, self.param_dtype, self.precision = dtype, param_dtype, precision
        self.bias = _bias(use_bias, bias_init, self.out_channels, param_dtype, rngs)
        selected = self.out_channels * self.rank
        shape = (self.in_channels, selected)
        init = pointwise_init or kernel_init or lecun_normal
        self.pointwise = nnx.Param(init(rngs.params(), shape, param_dtype))
        shape = (*self.kernel_size, self.rank, self.out_channels)
        init = depthwise_init or kernel_init or he_normal
        self.depthwise = nnx.Param(init(rngs.params(), shape, param_dtype))
        self.norm = nnx.data(
            BatchNorm(selected, dtype=dtype, param_dtype=param_dtype, rngs=rngs) if norm else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolves `x` `(*batch, H, W, C_in)` to `(*batch, H_out, W_out, C_out)`.

        Raises:
            ValueError: if `x` is no array of numbers, its shape does not fit, or its images have no
                pixels or are smaller than the kernel.
        """
        images, pointwise, kernel = _images(self, x), self.pointwise[...], self.depthwise[...]
        how = self.window, self.lowering, self.precision
        if self.norm is None:
            y = select(images, pointwise, kernel, *how)
        else:
            sums = weighted_sums(images, pointwise.astype(images.dtype), self.precision)
            y = depthwise.convolve(self.norm(sums), kernel.astype(images.dtype), *how)
        return _with_bias(self, y).reshape(*x.shape[:-3], *y.shape[1:])

    def composed_kernel(self) -> jax.Array:
        """The dense kernel `(K_h, K_w, C_in, C_out)` that computes the same function.

        Raises:
            ValueError: with `norm`, for then no dense kernel does.
        """
        if self.norm is not None:
            raise ValueError("norm=True: a layer normalised between its parts has no dense kernel")
        return composed_kernel(self.pointwise[...], self.depthwise[...])


def lowerings_taken(module: nnx.Module, dtype: Dtype) -> dict[type[nnx.Module], list[str]]:
    """What `"auto"` takes here for the layers of `module`, by their kind, if they have `dtype`."""
    found = collections.defaultdict(set)
    for _, layer in nnx.iter_graph(module):
        if isinstance(layer, SubKernelConv | ChannelSelectionConv):
            found[type(layer)].add(_fastest_lowering(layer, dtype))
    return {kind: sorted(taken) for kind, taken in found.items()}


def _fastest_lowering(layer: SubKernelConv | ChannelSelectionConv, dtype: Dtype) -> str:
    if isinstance(layer, SubKernelConv):
        return fastest_dense(jax.ShapeDtypeStruct(layer.kernel.shape, dtype))
    if layer.norm is not None:
        return fastest_depthwise()
    x = jax.ShapeDtypeStruct((1, 1, 1, layer.in_channels), dtype)
    return fastest_layer(x, layer.depthwise)


def _bias(
    use_bias: bool, init: Initializer, channels: int, dtype: Dtype, rngs: nnx.Rngs
) -> nnx.Param | None:
    return nnx.data(nnx.Param(init(rngs.params(), (channels,), dtype)) if use_bias else None)


def _images(layer: SubKernelConv | ChannelSelectionConv, x: jax.Array) -> jax.Array:
    """`x` with one batch axis, in the dtype of the computation."""
    numbers = isinstance(x, jax.Array | np.ndarray | nnx.Variable) and any(
        jnp.issubdtype(x.dtype, kind) for kind in (jnp.number, jnp.bool_)
    )
    if not numbers:
        kind = f" of {x.dtype}" if hasattr(x, "dtype") else f"={reprlib.repr(x)}"
        raise ValueError(f"x{kind}, of type {type(x).__name__}, must be an array of numbers")
    if x.ndim < 3 or x.shape[-1] != layer.in_channels:
        raise ValueError(
            f"x of shape {x.shape} must be (*batch, H, W, C_in) with "
            f"in_channels={layer.in_channels}"
        )
    *batch, height, width, channels = x.shape
    if 0 in (height, width):
        raise ValueError(f"an input of size (H, W)={(height, width)} has no pixels")
    layer.window.output_size((height, width), layer.kernel_size)  # raises where there is none
    dtype = layer.dtype or jnp.result_type(x, layer.param_dtype)
    return x.reshape(math.prod(batch), height, width, channels).astype(dtype)


def _with_bias(layer: SubKernelConv | ChannelSelectionConv, y: jax.Array) -> jax.Array:
    return y if layer.bias is None else y + layer.bias[...].astype(y.dtype).reshape(1, 1, 1, -1)


def _lowering_with(norm: bool, lowering: str) -> str:
    if norm and lowering in set(LOWERINGS) - set(depthwise.LOWERINGS):
        raise ValueError(
            f"lowering={lowering!r} computes both parts as one, which norm=True keeps apart; take "
            f"one of {', '.join(map(repr, depthwise.LOWERINGS))}"
        )
    return checked_lowering(lowering, LOWERINGS)


def _checked_rank(rank: int, in_channels: int, kernel_size: tuple[int, int]) -> int:
    most = min(in_channels, kernel_size[0] * kernel_size[1])
    rank = positive("rank", rank)
    if rank > most:
        raise ValueError(
            f"rank={rank} must be at most min(C_in, K_h·K_w) = {most}: a sum of more channel "
            "selections can express nothing that the dense convolution cannot"
        )
    return rank
