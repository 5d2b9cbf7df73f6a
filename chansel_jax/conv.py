"""Convolution layers: the ordinary dense one, channel selection, and the same from a subspace.

All are `flax.nnx` modules that take the arguments of `nnx.Conv` and are called as it is, so that a
network takes any of the four as an argument. Arrays are channels-last, `(*batch, *spatial, C)`.
"""

import collections
import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype as promote_to_one_dtype
from flax.typing import Dtype, Initializer, PrecisionLike, PromoteDtypeFn
from jax import lax

from chansel_jax import norm as normalization
from chansel_jax.ops import dense, depthwise, selection
from chansel_jax.ops.limits import Options, able
from chansel_jax.ops.lowerings import defining, here
from chansel_jax.ops.window import (
    Padding,
    Window,
    axis_names,
    is_int,
    kernel_sizes,
    positive,
    share_of_all,
)

lecun_normal = nnx.initializers.lecun_normal()
zeros = nnx.initializers.zeros_init()

# PyTorch writes this momentum as 0.1.
BatchNorm = functools.partial(normalization.BatchNorm, momentum=0.9)

SHARE = 0.25  # of the input channels, that BSConv-S has by default in its subspace

Metadata = Mapping[str, Any]
NO_METADATA: Metadata = MappingProxyType({})


class SubKernelConv(nnx.Module):
    """The dense convolution: a kernel for every pair of input and output channel.

    It is `nnx.Conv`, and has the same parameters, with the same initial values: `kernel`
    `(*kernel_size, C_in/G, C_out)` and, with `use_bias`, `bias` `(C_out,)`. The arguments, with
    their defaults, are those of `ChannelSelectionConv`, but for these:

    Args:
        mask: array of the kernel's shape that multiplies it; None by default.
        kernel_init: initialiser of `kernel`; LeCun's normal one by default.
        conv_general_dilated: function that convolves, called as `jax.lax.conv_general_dilated` is,
            which it is by default. With another, or with a mask, there is no other lowering.
        promote_dtype: brings `(inputs, kernel, bias)` to one dtype.
        kernel_metadata: metadata of `kernel`, such as `{"out_sharding": …}`.
        lowering: how it is computed, one of `SubKernelConv.LOWERINGS`; see
            `chansel_jax.ops.dense.dense_conv`. Default `"auto"`, the fastest.

    Raises:
        ValueError: naming the argument that is wrong, and its value. Of initialisers, metadata,
            dtypes and the precision JAX says what is wrong.
    """

    LOWERINGS: ClassVar[tuple[str, ...]] = dense.LOWERINGS

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: jax.Array | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = lecun_normal,
        bias_init: Initializer = zeros,
        conv_general_dilated: Callable[..., jax.Array] = lax.conv_general_dilated,
        promote_dtype: PromoteDtypeFn = promote_to_one_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
        lowering: str = "auto",
    ):
        window = strides, padding, kernel_dilation, input_dilation
        _set_geometry(self, in_features, out_features, kernel_size, window, feature_group_count)
        self.use_bias, self.precision = use_bias, precision
        self.dtype, self.param_dtype, self.promote_dtype = dtype, param_dtype, promote_dtype
        self.preferred_element_type = preferred_element_type
        channels = self.in_features // self.feature_group_count, self.out_features
        self.kernel_shape = (*self.kernel_size, *channels)
        self.mask, self.conv_general_dilated = mask, conv_general_dilated
        if mask is not None and getattr(mask, "shape", None) != self.kernel_shape:
            given = (
                f"shape {mask.shape}" if hasattr(mask, "shape") else f"type {type(mask).__name__}"
            )
            raise ValueError(
                f"mask of {given} must be an array of the kernel's shape {self.kernel_shape}"
            )
        self.lowering = lowering
        able(lowering, dense.LOWERINGS, window_of(self), _options(self))
        if self._by_its_function and lowering not in ("auto", "lax"):
            raise ValueError(
                f"lowering={lowering!r} does not have mask or conv_general_dilated; 'auto' and "
                "'lax' have them"
            )
        kernel = kernel_init(rngs.params(), self.kernel_shape, param_dtype)
        self.kernel = nnx.Param(kernel, **kernel_metadata)
        self.bias = _bias(self, bias_init, bias_metadata, rngs)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Convolves `inputs` `(*batch, *spatial, C_in)` to `(*batch, *spatial_out, C_out)`.

        Args:
            inputs: with any number of batch axes, or at most one if `kernel_size` was an integer.
            out_sharding: of the output, under a mesh of explicit axes; `"lax"` alone has it.

        Raises:
            ValueError: if `inputs` is no array of numbers, its shape does not fit, it has no pixels
                or is smaller than the kernel, or the lowering does not have `out_sharding`.
        """
        batch, inputs = _with_one_batch_axis(self, inputs)
        kernel, bias = self.kernel[...], None if self.bias is None else self.bias[...]
        if self.mask is not None:
            kernel = kernel * self.mask
        operands = self.promote_dtype((inputs, kernel, bias), dtype=self.dtype)
        inputs, kernel, bias = operands
        options = _options(self, out_sharding)
        if self._by_its_function:
            inputs, window = window_of(self).padded_first(inputs, self.kernel_size)
            y = dense.lax_conv(inputs, kernel, window, options, self.conv_general_dilated)
        else:
            y = dense.convolve(inputs, kernel, window_of(self), self.lowering, options)
        return _with_batch(_with_bias(y, bias), batch)

    @property
    def _by_its_function(self) -> bool:
        """Whether it computes by `conv_general_dilated`, whatever its lowering."""
        own = self.conv_general_dilated is not lax.conv_general_dilated
        return own or self.mask is not None


class ChannelSelectionConv(nnx.Module):
    """Channel selection: a weighted sum over the input channels, then one kernel, per output.

    Every output channel learns R weighted sums of the input channels (the pointwise part) and a
    kernel of `kernel_size`, K elements, for each of them (the depthwise part), which are added.
    With R = 1 this is the BSConv-U of Haase and Amthor, "Rethinking Depthwise Separable
    Convolutions" (CVPR 2020); sums of R of them are those of Guo et al., "Network Decoupling"
    (2018), and R = min(C_in/G, K) can express every dense convolution.

    Parameters, where output channel `o` owns the columns `o·R … o·R + R - 1` of `pointwise`, and
    selects from the C_in/G input channels of its group:

    - `pointwise` `(C_in/G, C_out·R)`
    - `depthwise` `(*kernel_size, R, C_out)`
    - `bias` `(C_out,)`, with `use_bias`
    - `norm.scale`, `norm.bias` `(C_out·R,)`, with `norm`

    The default initialisers give the composed kernel the variance of LeCun's initialisation of a
    dense one, which `nnx.Conv` has: 1 / (C_in/G) for `pointwise`, 1 / (K·R) for `depthwise`.

    Args:
        in_features: C_in, the channels of the input.
        out_features: C_out, the channels of the output.
        kernel_size: one size for each spatial axis, as `(3, 3)` for images; an integer is
            one-dimensional. Here and below, a sequence has an element for each spatial axis.
        strides: steps between outputs; here and below, an integer stands for all spatial axes, and
            None for 1. Default 1.
        padding: `"SAME"` (the default), `"SAME_LOWER"`, `"VALID"`, `"CIRCULAR"`, `"REFLECT"`, in
            one dimension `"CAUSAL"`, an integer, or a sequence of integers or pairs
            `(before, after)`; negative ones take pixels off. PyTorch's `padding=1` is `1` here; it
            differs from `"SAME"` where the stride is 2.
        input_dilation: distance between the input's elements, zeros in between. Default 1; with
            another the padding must be in integers.
        kernel_dilation: distance between a kernel's elements. Default 1.
        feature_group_count: G, groups of input and output channels; default 1. Every output channel
            selects from the input channels of its own group.
        use_bias: whether to add a bias to the output. Default True.
        mask: must be None: there is no dense kernel to mask.
        dtype: that of the computation; by default what input and parameters promote to.
        param_dtype: that of the parameters. Default float32.
        precision: `jax.lax.Precision` of the products.
        kernel_init: initialiser of both parts where `pointwise_init` and `depthwise_init` are not
            given, which is called with the shape of each; LeCun's normal one by default. If it
            names the sharding of the composed kernel's axes, as `nnx.with_partitioning` does,
            `pointwise` takes the names of the last two axes, `depthwise` those of the spatial axes
            and of the last.
        bias_init: initialiser of `bias`; zeros by default.
        conv_general_dilated: must be that of `jax.lax`: there is no one convolution to replace.
        promote_dtype: brings `(inputs, pointwise, depthwise, bias)` to one dtype; by default that
            of `nnx.Conv`.
        preferred_element_type: dtype of the convolution's output; by default that of its input.
        rngs: the stream `params` initialises the parameters, in the order above.
        kernel_metadata: metadata of both parts; names of axes are taken as `kernel_init` says.
        bias_metadata: metadata of `bias`.
        rank: R, from 1 (the default) to min(C_in/G, K).
        pointwise_init: initialiser of `pointwise`, in the place of `kernel_init`.
        depthwise_init: initialiser of `depthwise`, likewise.
        norm: whether BatchNorm normalises the weighted sums. Default False.
        lowering: how it is computed, one of `ChannelSelectionConv.LOWERINGS`; see
            `chansel_jax.ops.selection.channel_selection`. Default `"auto"`, the fastest; with
            `norm` there are only `"auto"`, `"grouped"` and `"shifted"`.
        pointwise_metadata: metadata of `pointwise`, over what `kernel_metadata` says.
        depthwise_metadata: metadata of `depthwise`, likewise.

    Raises:
        ValueError: naming the argument that is wrong, and its value. Of initialisers, metadata,
            dtypes and the precision JAX says what is wrong.
    """

    LOWERINGS: ClassVar[tuple[str, ...]] = selection.LOWERINGS

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = lecun_normal,
        bias_init: Initializer = zeros,
        conv_general_dilated: Callable[..., jax.Array] = lax.conv_general_dilated,
        promote_dtype: PromoteDtypeFn = promote_to_one_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
        rank: int = 1,
        pointwise_init: Initializer | None = None,
        depthwise_init: Initializer | None = None,
        norm: bool = False,
        lowering: str = "auto",
        pointwise_metadata: Metadata = NO_METADATA,
        depthwise_metadata: Metadata = NO_METADATA,
    ):
        _refuse_what_is_dense(mask, conv_general_dilated)
        window = strides, padding, kernel_dilation, input_dilation
        _set_geometry(self, in_features, out_features, kernel_size, window, feature_group_count)
        self.use_bias, self.precision = use_bias, precision
        self.dtype, self.param_dtype, self.promote_dtype = dtype, param_dtype, promote_dtype
        self.preferred_element_type = preferred_element_type
        selected_from = self.in_features // self.feature_group_count
        self.rank = _checked_rank(rank, selected_from, self.kernel_size)
        self.lowering = _lowering_with(norm, lowering)
        able(lowering, selection.LOWERINGS, window_of(self), _options(self))
        selected, axes = self.out_features * self.rank, len(self.kernel_size) + 2
        self.pointwise = _part(
            (selected_from, selected),
            self._names_of_pointwise,
            axes,
            (pointwise_init, kernel_init),
            (pointwise_metadata, kernel_metadata),
            param_dtype,
            rngs,
        )
        self.depthwise = _part(
            (*self.kernel_size, self.rank, self.out_features),
            lambda names: (*names[:-2], None, names[-1]),
            axes,
            (depthwise_init, kernel_init),
            (depthwise_metadata, kernel_metadata),
            param_dtype,
            rngs,
        )
        self.bias = _bias(self, bias_init, bias_metadata, rngs)
        self.norm = nnx.data(
            BatchNorm(selected, dtype=dtype, param_dtype=param_dtype, rngs=rngs) if norm else None
        )

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Convolves `inputs` `(*batch, *spatial, C_in)` to `(*batch, *spatial_out, C_out)`.

        Args:
            inputs: with any number of batch axes, or at most one if `kernel_size` was an integer.
            out_sharding: of the output, under a mesh of explicit axes; `"composed"` and
                `"grouped"` have it.

        Raises:
            ValueError: if `inputs` is no array of numbers, its shape does not fit, it has no pixels
                or is smaller than the kernel, or the lowering does not have `out_sharding`.
        """
        batch, inputs = _with_one_batch_axis(self, inputs)
        parts = self._parts()
        bias = None if self.bias is None else self.bias[...]
        inputs, *promoted, bias = self.promote_dtype((inputs, *parts, bias), dtype=self.dtype)
        if self.promote_dtype is not promote_to_one_dtype:
            parts = promoted  # which may be more than cast; else they are composed, then cast
        y = self._convolved(inputs, *parts, _options(self, out_sharding))
        return _with_batch(_with_bias(y, bias), batch)

    def composed_kernel(self) -> jax.Array:
        """The dense kernel `(*kernel_size, C_in/G, C_out)` that computes the same function.

        Raises:
            ValueError: with `norm`, for then no dense kernel does.
        """
        if self.norm is not None:
            raise ValueError("norm=True: a layer normalised between its parts has no dense kernel")
        return self._composed(*self._parts())

    @property
    def _selected_from(self) -> int:
        """The channels that the outputs of all groups are computed from, as it is computed."""
        return self.in_features

    @staticmethod
    def _names_of_pointwise(names: tuple) -> tuple:
        """The names of the axes of `pointwise`, of those of the composed kernel."""
        return names[-2:]

    def _parts(self) -> tuple[jax.Array, ...]:
        return self.pointwise[...], self.depthwise[...]

    def _composed(self, *parts: jax.Array) -> jax.Array:
        return selection.composed_kernel(*parts)

    def _convolved(
        self, inputs: jax.Array, pointwise: jax.Array, kernel: jax.Array, options: Options
    ) -> jax.Array:
        """The output without bias, of what has one batch axis and the dtype of the computation."""
        how = window_of(self), self.lowering, options
        if self.norm is None:
            return selection.select(inputs, pointwise, kernel, *how)
        pointwise, kernel = (part.astype(inputs.dtype) for part in (pointwise, kernel))
        sums = self.norm(selection.weighted_sums(inputs, pointwise, options))
        return depthwise.convolve(sums.astype(inputs.dtype), kernel, *how)


class SubspaceChannelSelectionConv(ChannelSelectionConv):
    """Channel selection from a subspace: the pointwise part is a product of two matrices.

    The C_in/G input channels of a group are first summed up to M channels, which all outputs of the
    group share, and from which each then selects as in `ChannelSelectionConv`. With R = 1 and G = 1
    this is the BSConv-S of Haase and Amthor, "Rethinking Depthwise Separable Convolutions" (CVPR
    2020).

    Parameters, besides those of `ChannelSelectionConv`:

    - `subspace` `(C_in/G, G·M)`, group `g` owns the columns `g·M … g·M + M - 1`
    - `pointwise` `(M, C_out·R)`, in the place of `(C_in/G, C_out·R)`
    - `subspace_norm.scale`, `subspace_norm.bias` `(G·M,)`, with `norm`

    Where fewer multiply-adds follow, as where M is C_in/G, both matrices are multiplied first.

    Args:
        kernel_init: initialiser of all three parts. Of the names of the composed kernel's axes,
            `subspace` takes that of the last but one, `pointwise` the last.
        promote_dtype: brings `(inputs, subspace, pointwise, depthwise, bias)` to one dtype.
        rngs: the stream `params` initialises `subspace` first.
        kernel_metadata: metadata of all three parts.
        rank: R, from 1 (the default) to min(M, K).
        pointwise_init: initialiser of `subspace` and of `pointwise`.
        norm: whether BatchNorm normalises the channels of the subspace, and the weighted sums.
        pointwise_metadata: metadata of `subspace` and of `pointwise`.
        share: M is this share of C_in/G, rounded up, but at least 4 and at most C_in/G. In (0, 1];
            default 1 / 4.

    The other arguments are those of `ChannelSelectionConv`.

    Raises:
        ValueError: naming the argument that is wrong, and its value. Of initialisers, metadata,
            dtypes and the precision JAX says what is wrong.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: PrecisionLike = None,
        kernel_init: Initializer = lecun_normal,
        bias_init: Initializer = zeros,
        conv_general_dilated: Callable[..., jax.Array] = lax.conv_general_dilated,
        promote_dtype: PromoteDtypeFn = promote_to_one_dtype,
        preferred_element_type: Dtype | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
        rank: int = 1,
        pointwise_init: Initializer | None = None,
        depthwise_init: Initializer | None = None,
        norm: bool = False,
        lowering: str = "auto",
        pointwise_metadata: Metadata = NO_METADATA,
        depthwise_metadata: Metadata = NO_METADATA,
        share: float = SHARE,
    ):
        in_features, _, groups = _checked_channels(in_features, out_features, feature_group_count)
        selected_from = in_features // groups
        size = subspace_size(selected_from, share) * groups
        self.share = share
        self.subspace = _part(
            (selected_from, size),
            lambda names: (names[-2], None),
            len(kernel_sizes(kernel_size)) + 2,
            (pointwise_init, kernel_init),
            (pointwise_metadata, kernel_metadata),
            param_dtype,
            rngs,
        )
        super().__init__(
            size,
            out_features,
            kernel_size,
            strides,
            padding=padding,
            input_dilation=input_dilation,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            use_bias=use_bias,
            mask=mask,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            kernel_init=kernel_init,
            bias_init=bias_init,
            conv_general_dilated=conv_general_dilated,
            promote_dtype=promote_dtype,
            preferred_element_type=preferred_element_type,
            rngs=rngs,
            kernel_metadata=kernel_metadata,
            bias_metadata=bias_metadata,
            rank=rank,
            pointwise_init=pointwise_init,
            depthwise_init=depthwise_init,
            norm=norm,
            lowering=lowering,
            pointwise_metadata=pointwise_metadata,
            depthwise_metadata=depthwise_metadata,
        )
        self.in_features = in_features
        self.subspace_norm = nnx.data(
            BatchNorm(size, dtype=dtype, param_dtype=param_dtype, rngs=rngs) if norm else None
        )

    def merged_pointwise(self) -> jax.Array:
        """`pointwise` `(C_in/G, C_out·R)` of the plain channel selection that computes the same.

        It is the product of both matrices.

        Raises:
            ValueError: with `norm`, for then no plain channel selection does.
        """
        if self.norm is not None:
            raise ValueError("norm=True: matrices with BatchNorm between them have no product")
        return self._product(self.subspace[...], self.pointwise[...])

    def orthonormal_loss(self) -> jax.Array:
        """The sum over the groups of ‖Wᵀ·W - I‖, where W `(C_in/G, M)` is the part of `subspace`.

        It is the Frobenius norm, which is zero where the M channels are orthonormal combinations of
        those of the input. Haase and Amthor add 0.1 of the sum over all layers to a network's loss.
        """
        groups = self.feature_group_count
        parts = self.subspace[...].reshape(self.subspace.shape[0], groups, -1)
        parts = parts.astype(jnp.promote_types(parts.dtype, jnp.float32))
        products = jnp.einsum("igm,ign->gmn", parts, parts, precision=lax.Precision.HIGHEST)
        squares = jnp.sum((products - jnp.eye(parts.shape[-1])[None]) ** 2, axis=(1, 2))
        # The root has no derivative at 0, where the loss is the least: let it be 0 there.
        positive_squares = jnp.where(squares > 0, squares, 1)
        return jnp.sum(jnp.where(squares > 0, jnp.sqrt(positive_squares), 0))

    @property
    def _selected_from(self) -> int:
        return self.in_features if self._is_cheaper_multiplied() else self.subspace.shape[1]

    @staticmethod
    def _names_of_pointwise(names: tuple) -> tuple:
        return None, names[-1]

    def _parts(self) -> tuple[jax.Array, ...]:
        return self.subspace[...], *super()._parts()

    def _composed(self, subspace: jax.Array, *parts: jax.Array) -> jax.Array:
        pointwise, kernel = parts
        return super()._composed(self._product(subspace, pointwise), kernel)

    def _convolved(
        self, inputs: jax.Array, subspace: jax.Array, *parts: jax.Array | Options
    ) -> jax.Array:
        pointwise, kernel, options = parts
        if self.norm is None and self._is_cheaper_multiplied():
            pointwise = self._product(subspace, pointwise)
            return super()._convolved(inputs, pointwise, kernel, options)
        sums = selection.weighted_sums(inputs, subspace.astype(inputs.dtype), options)
        if self.subspace_norm is not None:
            sums = self.subspace_norm(sums)
        return super()._convolved(sums.astype(inputs.dtype), pointwise, kernel, options)

    def _is_cheaper_multiplied(self) -> bool:
        """Whether fewer multiply-adds a pixel follow if both matrices are multiplied first."""
        if defining(selection.LOWERINGS):
            return False
        inputs, (size, selected) = self.subspace.shape[0], self.pointwise.shape
        selected //= self.feature_group_count
        return inputs * selected <= size * (inputs + selected)

    def _product(self, subspace: jax.Array, pointwise: jax.Array) -> jax.Array:
        """The matrix `(C_in/G, C_out·R)` that both are."""
        groups = self.feature_group_count
        product = jnp.einsum(
            "igm,mgo->igo",
            subspace.reshape(subspace.shape[0], groups, -1),
            pointwise.reshape(pointwise.shape[0], groups, -1),
            precision=lax.Precision.HIGHEST,
        )
        return product.reshape(subspace.shape[0], -1)


def subspace_size(in_features: int, share: float) -> int:
    """M of `SubspaceChannelSelectionConv`: `share` of the channels, at least 4, at most all.

    Raises:
        ValueError: if `share` is not in (0, 1].
    """
    size = math.ceil(share_of_all("share", share) * in_features)
    return min(in_features, max(4, size))


def unwrapped(conv: Callable[..., nnx.Module]) -> Callable[..., nnx.Module]:
    """What a `functools.partial`, or one of one, in the end calls."""
    while isinstance(conv, functools.partial):
        conv = conv.func
    return conv


def lowerings_taken(module: nnx.Module, dtype: Dtype) -> dict[type[nnx.Module], list[str]]:
    """What `"auto"` takes here for the layers of `module`, by their kind, if they have `dtype`."""
    found = collections.defaultdict(set)
    for _, layer in nnx.iter_graph(module):
        if isinstance(layer, SubKernelConv | ChannelSelectionConv):
            found[type(layer)].add(_fastest_lowering(layer, dtype))
    return {kind: sorted(taken) for kind, taken in found.items()}


def _fastest_lowering(layer: SubKernelConv | ChannelSelectionConv, dtype: Dtype) -> str:
    how = window_of(layer), _options(layer)
    if isinstance(layer, SubKernelConv):
        if layer._by_its_function:
            return "lax"
        return dense.fastest(here(), jax.ShapeDtypeStruct(layer.kernel.shape, dtype), *how)
    x = jax.ShapeDtypeStruct((1, *layer.kernel_size, layer._selected_from), dtype)
    if layer.norm is not None:
        return depthwise.fastest(here(), x, *how)
    return selection.fastest(here(), x, layer.depthwise, *how)


def _set_geometry(
    layer: nnx.Module,
    in_features: int,
    out_features: int,
    kernel_size: int | Sequence[int],
    window: tuple[Any, ...],
    groups: int,
) -> None:
    """Gives `layer` its sizes and its window, each in one form whatever its spelling was."""
    in_features, out_features, groups = _checked_channels(in_features, out_features, groups)
    layer.in_features, layer.out_features = in_features, out_features
    layer.kernel_size = kernel_sizes(kernel_size)
    layer.kernel_size_is_integer = is_int(kernel_size)
    layer.feature_group_count = groups
    layer.strides, layer.padding, layer.kernel_dilation, layer.input_dilation = window
    layer.strides, layer.padding, layer.kernel_dilation, layer.input_dilation = window_of(layer)


def window_of(layer: SubKernelConv | ChannelSelectionConv) -> Window:
    """How the kernel of `layer` moves over its input, by its attributes as they are now."""
    return Window.of(
        layer.strides,
        layer.padding,
        layer.kernel_dilation,
        layer.input_dilation,
        dimensions=len(layer.kernel_size),
        dilation_name="kernel_dilation",
    )


def _checked_channels(in_features: int, out_features: int, groups: int) -> tuple[int, int, int]:
    groups = positive("feature_group_count", groups)
    named = {"in_features": in_features, "out_features": out_features}
    for name, channels in named.items():
        if positive(name, channels) % groups:
            raise ValueError(f"feature_group_count={groups} must divide {name}={channels}")
    return int(in_features), int(out_features), groups


def _options(layer: SubKernelConv | ChannelSelectionConv, out_sharding: Any = None) -> Options:
    precision = layer.precision
    if isinstance(precision, list):
        precision = tuple(precision)  # which can be hashed
    groups, dtype = layer.feature_group_count, layer.preferred_element_type
    return Options(groups, precision, dtype, out_sharding)


def _part(
    shape: tuple[int, ...],
    names_of_part: Callable[[tuple], tuple],
    axes: int,
    inits: tuple[Initializer | None, Initializer],
    metadata: tuple[Metadata, Metadata],
    dtype: Dtype,
    rngs: nnx.Rngs,
) -> nnx.Param:
    """One of the two parts of channel selection.

    The initialiser and the metadata are its own, and else those of the composed kernel, whose
    `axes` `names_of_part` takes by their names to those of the part.
    """
    (own_init, kernel_init), (own_metadata, kernel_metadata) = inits, metadata
    value = (own_init or kernel_init)(rngs.params(), shape, dtype)
    given = _sharded_as(kernel_metadata, names_of_part, axes)
    if isinstance(value, nnx.VariableMetadata):
        of_init = value.metadata
        if own_init is None:
            of_init = _sharded_as(of_init, names_of_part, axes)
        # Flax lets what the initialiser says win over the rest.
        value = dataclasses.replace(value, metadata={**of_init, **own_metadata})
    return nnx.Param(value, **{**given, **own_metadata})


def _sharded_as(metadata: Metadata, names_of_part: Callable[[tuple], tuple], axes: int) -> Metadata:
    """`metadata` of the composed kernel, of so many axes, with the names of a part's axes."""
    found = dict(metadata)
    for key in ("out_sharding", "sharding", "sharding_names"):  # in several versions of Flax
        names = metadata.get(key)
        if names is None:
            continue
        if not isinstance(names, tuple | list | jax.sharding.PartitionSpec):
            raise ValueError(f"{key}={names!r} of a kernel's metadata must name its axes")
        found[key] = names_of_part((*names, *[None] * (axes - len(names))))
    return found


def _bias(
    layer: SubKernelConv | ChannelSelectionConv,
    init: Initializer,
    metadata: Metadata,
    rngs: nnx.Rngs,
) -> nnx.Param | None:
    if not layer.use_bias:
        return nnx.data(None)
    return nnx.Param(init(rngs.params(), (layer.out_features,), layer.param_dtype), **metadata)


def _with_one_batch_axis(
    layer: SubKernelConv | ChannelSelectionConv, inputs: jax.Array
) -> tuple[tuple[int, ...], jax.Array]:
    """The batch axes of `inputs`, and `inputs` with one batch axis in their place."""
    numbers = isinstance(inputs, jax.Array | np.ndarray | nnx.Variable) and any(
        jnp.issubdtype(inputs.dtype, kind) for kind in (jnp.number, jnp.bool_)
    )
    if not numbers:
        kind = f" of {inputs.dtype}" if hasattr(inputs, "dtype") else f"={reprlib.repr(inputs)}"
        raise ValueError(
            f"inputs{kind}, of type {type(inputs).__name__}, must be an array of numbers"
        )
    axes = len(layer.kernel_size) + 1
    _check_shape(layer, inputs.shape, axes)
    batch, image = inputs.shape[:-axes], inputs.shape[-axes:]
    if 0 in image[:-1]:
        raise ValueError(f"an input of size ({axis_names(axes - 1)})={image[:-1]} has no pixels")
    window_of(layer).output_size(image[:-1], layer.kernel_size)  # raises where there is none
    if len(batch) != 1:
        inputs = inputs.reshape(math.prod(batch), *image)
    return batch, inputs


def _check_shape(
    layer: SubKernelConv | ChannelSelectionConv, shape: tuple[int, ...], axes: int
) -> None:
    if layer.kernel_size_is_integer and len(shape) > axes + 1:
        (size,) = layer.kernel_size
        raise ValueError(
            f"inputs of shape {shape}: kernel_size={size} is one-dimensional, as in nnx.Conv; "
            f"write kernel_size=({size}, {size}) for images, or ({size},) for several batch axes"
        )
    if len(shape) < axes or shape[-1] != layer.in_features:
        others = shape[-axes + 1 :]
        first = len(shape) >= axes and shape[-axes] == layer.in_features not in others
        hint = "; these seem to have the channels first" if first else ""
        raise ValueError(
            f"inputs of shape {shape} must be (*batch, {axis_names(axes - 1)}, C_in) with "
            f"in_features={layer.in_features}{hint}"
        )


def _with_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)


def _with_batch(y: jax.Array, batch: tuple[int, ...]) -> jax.Array:
    return y if len(batch) == 1 else y.reshape(*batch, *y.shape[1:])


def _refuse_what_is_dense(mask: Any, conv_general_dilated: Callable[..., jax.Array]) -> None:
    if mask is not None:
        raise ValueError(
            f"mask of type {type(mask).__name__} must be None: channel selection has no dense "
            "kernel to mask, SubKernelConv has one"
        )
    if conv_general_dilated is not lax.conv_general_dilated:
        raise ValueError(
            f"conv_general_dilated={reprlib.repr(conv_general_dilated)} must be that of jax.lax: "
            "channel selection is not one convolution, SubKernelConv is"
        )


def _lowering_with(norm: bool, lowering: str) -> str:
    if norm and lowering in set(selection.LOWERINGS) - set(depthwise.LOWERINGS):
        raise ValueError(
            f"lowering={lowering!r} computes both parts as one, which norm=True keeps apart; take "
            f"one of {', '.join(map(repr, depthwise.LOWERINGS))}"
        )
    return lowering


def _checked_rank(rank: int, channels: int, kernel_size: Sequence[int]) -> int:
    most = min(channels, math.prod(kernel_size))
    rank = positive("rank", rank)
    if rank > most:
        raise ValueError(
            f"rank={rank} must be at most {most}, the least of the channels that are selected from "
            "(C_in/G, or those of its subspace) and the kernel's elements: a sum of more channel "
            "selections can express nothing that the dense convolution cannot"
        )
    return rank
