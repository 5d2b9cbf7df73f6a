"""Residual networks that take their convolution as an argument.

He et al., "Deep Residual Learning for Image Recognition" (2015); those whose BatchNorm and ReLU
come before each convolution are of Zagoruyko and Komodakis, "Wide Residual Networks" (2016). Images
are NHWC, logits `(N, num_classes)`.
"""

import collections
import dataclasses
import functools
import numbers
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from chansel_jax.conv import (
    BatchNorm,
    ChannelSelectionConv,
    SubKernelConv,
    SubspaceChannelSelectionConv,
    unwrapped,
)
from chansel_jax.norm import with_moments
from chansel_jax.ops.moments import Moments
from chansel_jax.ops.window import positive

CONVS = {
    "chansel": ChannelSelectionConv,
    "subspace": SubspaceChannelSelectionConv,
    "subkernel": SubKernelConv,
}
DENSE = (SubKernelConv, nnx.Conv)

he_normal = nnx.initializers.he_normal()  # for convolutions that ReLU follows

Make = Callable[..., nnx.Module]  # a layer's constructor; what it lacks is `rngs`


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer that has parameters: how it is made, and where in its network it stands.

    Attributes:
        path: as in `"blocks.2.shortcut"`.
        make: its constructor with every argument but `rngs`. The positional ones are the channels
            of the input and of the output, and the size of a convolution's kernel; of a BatchNorm
            they are its channels.
        reduction: how many pixels of the image, each way, one pixel of the layer's input stands
            for; where they do not divide, the last one stands for fewer.
    """

    path: str
    make: functools.partial[nnx.Module]
    reduction: int


Replaced = Literal["all", "spatial", "3x3"]  # which convolutions `ResNetConfig.conv` replaces


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """What a `ResNet` is built from.

    Attributes:
        conv: the convolution, called as `nnx.Conv` is. Its kernels begin as He et al. initialise
            them, in channel selection the depthwise part, unless it is a `functools.partial` that
            brings a `kernel_init`.
        num_classes: the number of logits.
        blocks: residual blocks in each stage; every stage but the first halves the image.
        width: channels of the first stage; every further stage doubles them.
        stem: `"plain"`, a 3 × 3 convolution with bias and ReLU; `"small"`, a 3 × 3 convolution,
            BatchNorm and ReLU; or `"pooled"`, a 7 × 7 convolution of stride 2, BatchNorm, ReLU and
            a max pooling of stride 2.
        block: `"basic"`, two 3 × 3 convolutions, each with a BatchNorm behind it; `"bottleneck"`, a
            1 × 1, a 3 × 3 and a 1 × 1 convolution, the last of which has four times the channels;
            or `"preactivation"`, two 3 × 3 convolutions with BatchNorm and ReLU before each. Of
            these a small stem is the convolution alone, and a last BatchNorm and ReLU follow.
        stem_width: channels of the stem; by default `width`.
        input_norm: whether a BatchNorm normalises the images.
        replaced: which convolutions are `conv`; the others are ordinary ones. `"all"` are all but
            the one of a plain stem. `"spatial"` are those of them that are not 1 × 1: with one
            weight for each output channel before a BatchNorm, the depthwise part of a 1 × 1 channel
            selection expresses nothing more. `"3x3"` are those with a kernel of 3 × 3, also in a
            plain stem, which is what Haase and Amthor's package `bsconv` replaces.
        rank: the rank of every `conv`, or a rank for each, in the network's order, where 0 makes it
            an ordinary convolution; but 1 × 1 convolutions keep rank 1, and one rank for all is at
            most `in_channels` in the stem.
        use_bias: whether every convolution but a plain stem's, which has one, has a bias before its
            BatchNorm.
        dropout_rate: the share of pooled features dropped before the last layer while training.
        dtype: of the computation; the parameters and the logits stay float32.
        in_channels: channels of the images.
    """

    conv: Callable[..., nnx.Module]
    num_classes: int
    blocks: tuple[int, ...]
    width: int
    stem: Literal["plain", "small", "pooled"]
    block: Literal["basic", "bottleneck", "preactivation"] = "basic"
    stem_width: int | None = None
    input_norm: bool = False
    replaced: Replaced = "all"
    rank: int | tuple[int, ...] = 1
    use_bias: bool = False
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32
    in_channels: int = 3

    def __post_init__(self):
        if not callable(self.conv):
            raise ValueError(f"conv={self.conv!r} must be a layer that is called as nnx.Conv is")
        for name in ("num_classes", "width", "in_channels"):
            positive(name, getattr(self, name))
        try:
            jnp.dtype(self.dtype)
        except TypeError as error:
            raise ValueError(f"dtype={self.dtype!r} must be a dtype") from error
        if self.stem_width is not None:
            positive("stem_width", self.stem_width)
        if not isinstance(self.blocks, Sequence) or not self.blocks:
            raise ValueError(f"blocks={self.blocks!r} must be a sequence of one stage or more")
        object.__setattr__(self, "blocks", tuple(self.blocks))
        for count in self.blocks:
            positive("blocks", count)
        choices_of = {"stem": _STEMS, "block": _BLOCKS, "replaced": get_args(Replaced)}
        for name, choices in choices_of.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")
        self._check_ranks()
        if not isinstance(self.dropout_rate, numbers.Real) or not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate={self.dropout_rate!r} must be in [0, 1)")

    def _check_ranks(self) -> None:
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        for rank in ranks:
            if rank != 0 or not isinstance(self.rank, tuple):
                positive("rank", rank)
        if max(ranks, default=1) > 9:
            raise ValueError(f"rank={self.rank} must be at most 9, the elements of a 3 × 3 kernel")
        if max(ranks, default=1) > 1 and unwrapped(self.conv) in DENSE:
            raise ValueError(f"rank={self.rank}: the dense convolution has no rank")
        count = self._spatial_convs
        if isinstance(self.rank, tuple) and len(self.rank) != count:
            raise ValueError(
                f"rank={self.rank} must have a rank for each of {count} convolutions; an integer "
                "is the rank of all"
            )

    @property
    def _spatial_convs(self) -> int:
        """How many `conv` are not 1 × 1."""
        in_blocks = {"basic": 2, "bottleneck": 1, "preactivation": 2}[self.block]
        return self.replaces_stem + in_blocks * sum(self.blocks)

    @property
    def replaces_stem(self) -> bool:
        """Whether the stem's convolution is `conv`."""
        return self.stem != ("pooled" if self.replaced == "3x3" else "plain")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every `conv` that is not 1 × 1, in the network's order; 0 is dense."""
        if isinstance(self.rank, tuple):
            return self.rank
        stem = (min(self.rank, self.in_channels),) if self.replaces_stem else ()
        return stem + (self.rank,) * (self._spatial_convs - len(stem))

    @property
    def image_size(self) -> int:
        """The pixels, each way, of the images that such networks are made for; they take others."""
        return 224 if self.stem == "pooled" else 32

    def layers(self) -> Iterator[Layer]:
        """Every layer that has parameters, in the order in which they are initialised."""
        ranks, inputs = iter(self.ranks), self.stem_width or self.width
        if self.input_norm:
            yield Layer("input_norm", self._norm(self.in_channels), 1)
        yield from self._stem_layers(inputs, ranks)
        reduction = 4 if self.stem == "pooled" else 1
        stages = [(stage, i) for stage, count in enumerate(self.blocks) for i in range(count)]
        for number, (stage, i) in enumerate(stages):
            outputs = self.width * 2**stage * (4 if self.block == "bottleneck" else 1)
            sizes = inputs, outputs, 2 if stage and not i else 1
            for name, make, reduced in self._block_layers(*sizes, ranks):
                yield Layer(f"blocks.{number}.{name}", make, reduction * reduced)
            inputs, reduction = outputs, reduction * sizes[-1]
        if self.block == "preactivation":
            yield Layer("last_norm", self._norm(inputs), reduction)
        linear = functools.partial(nnx.Linear, inputs, self.num_classes, dtype=self.dtype)
        yield Layer("classifier", linear, reduction)

    def _stem_layers(self, outputs: int, ranks: Iterator[int]) -> Iterator[Layer]:
        pooled = self.stem == "pooled"
        conv = _conv(
            self.conv if self.replaces_stem else SubKernelConv,
            self.in_channels,
            outputs,
            7 if pooled else 3,
            strides=2 if pooled else 1,
            rank=next(ranks) if self.replaces_stem else 1,
            use_bias=self.use_bias or self.stem == "plain",
            dtype=self.dtype,
        )
        yield Layer("stem.conv", conv, 1)
        if pooled or (self.stem == "small" and self.block != "preactivation"):
            yield Layer("stem.norm", self._norm(outputs), 2 if pooled else 1)

    def _block_layers(
        self, inputs: int, outputs: int, strides: int, ranks: Iterator[int]
    ) -> Iterator[tuple[str, Make, int]]:
        """Each layer of a block: its name, how it is made, and its reduction within the block."""
        given = {"use_bias": self.use_bias, "dtype": self.dtype}
        spatial = functools.partial(_conv, self.conv, **given)
        point = functools.partial(
            _conv, self.conv if self.replaced == "all" else SubKernelConv, **given
        )
        if self.block == "bottleneck":
            inner = outputs // 4
            convs = (
                (point(inputs, inner, 1), 1),
                (spatial(inner, inner, 3, strides=strides, rank=next(ranks)), 1),
                (point(inner, outputs, 1), strides),
            )
        else:
            convs = (
                (spatial(inputs, outputs, 3, strides=strides, rank=next(ranks)), 1),
                (spatial(outputs, outputs, 3, rank=next(ranks)), strides),
            )
        before = self.block == "preactivation"
        for number, (conv, reduced) in enumerate(convs, 1):
            channels_in, channels_out, _ = conv.args
            if before:
                yield f"norm{number}", self._norm(channels_in), reduced
            yield f"conv{number}", conv, reduced
            if not before:
                norm = self._norm(channels_out)
                yield f"norm{number}", norm, reduced * conv.keywords["strides"]
        if strides > 1 or inputs != outputs:
            yield "shortcut", point(inputs, outputs, 1, strides=strides), 1
            if not before:
                yield "shortcut_norm", self._norm(outputs), strides

    def _norm(self, channels: int) -> Make:
        return functools.partial(BatchNorm, channels, dtype=self.dtype)


def _conv(
    conv: Make,
    inputs: int,
    outputs: int,
    kernel: int,
    *,
    strides: int = 1,
    rank: int = 1,
    use_bias: bool,
    dtype: Dtype,
) -> functools.partial[nnx.Module]:
    """A `conv` of so many channels in and out, and with a kernel of `kernel` × `kernel`."""
    conv = conv if rank else _dense_like(conv)
    given = {"strides": strides, "padding": kernel // 2, "use_bias": use_bias, "dtype": dtype}
    given |= {"rank": rank} if rank > 1 else {}
    return functools.partial(conv, inputs, outputs, (kernel, kernel), **given, **_he(conv))


def _dense_like(conv: Make) -> Make:
    """The ordinary convolution with those arguments of channel selection that it has too."""
    shared = "kernel_init", "bias_init", "param_dtype", "precision"
    brought = getattr(conv, "keywords", {})
    return functools.partial(SubKernelConv, **{k: brought[k] for k in shared if k in brought})


def _he(conv: Make) -> dict[str, nnx.Initializer]:
    """He's initialisation for `conv`, if it does not bring its own."""
    kind = unwrapped(conv)
    has_parts = isinstance(kind, type) and issubclass(kind, ChannelSelectionConv)
    part = "depthwise_init" if has_parts else "kernel_init"
    brought = getattr(conv, "keywords", {})
    return {} if {part, "kernel_init"} & brought.keys() else {part: he_normal}


class ResNet(nnx.Module):
    """Stem, stages of residual blocks, global average pooling, dropout, classifier.

    Args:
        config: the network's shape.
        rngs: the streams `params` (initialisation) and `dropout` (masks while training).
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        parts = collections.defaultdict(dict)
        for layer in config.layers():
            part, _, name = layer.path.rpartition(".")
            parts[part][name] = layer.make
        own = parts[""]  # the layers that are of no part

        def made(name: str) -> nnx.Module | None:
            return nnx.data(own[name](rngs=rngs) if name in own else None)

        block = _BLOCKS[config.block]
        self.input_norm = made("input_norm")
        self.stem = _STEMS[config.stem](**parts["stem"], rngs=rngs)
        numbers = range(sum(config.blocks))
        self.blocks = nnx.List([block(**parts[f"blocks.{i}"], rngs=rngs) for i in numbers])
        self.last_norm = made("last_norm")
        self.dropout = nnx.Dropout(config.dropout_rate, rngs=rngs)
        self.classifier = made("classifier")

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits `(N, num_classes)`, float32, of the images `x` `(N, H, W, in_channels)`.

        Args:
            x: the images, normalised.
            rngs: the stream `dropout` takes the place of the network's own while training.
        """
        if self.input_norm is not None:
            x = _named("input_norm", self.input_norm, x)
        x = _named("stem", self.stem, x)
        for number, block in enumerate(self.blocks):
            x = _named(f"blocks.{number}", block, x)
        if self.last_norm is not None:
            x = _normalised("last_norm", self.last_norm, x)
        x = jnp.mean(x, axis=(1, 2))
        x = self.dropout(x, rngs=rngs)
        return _named("classifier", self.classifier, x).astype(jnp.float32)


def _named(name: str, layer: nnx.Module, x: jax.Array, **how: Any) -> jax.Array:
    """`layer(x, **how)`; a profile shows its operations under that name."""
    with jax.named_scope(name):
        return layer(x, **how)


def _normalised(
    name: str,
    norm: nnx.Module,
    x: jax.Array,
    residual: jax.Array | None = None,
    relu: bool = True,
    moments: Moments | None = None,
) -> jax.Array:
    """`relu(norm(x) + residual)`, of which our own BatchNorm makes one pass."""
    if isinstance(norm, unwrapped(BatchNorm)):
        known = {} if moments is None else {"moments": moments}  # a subclass may not know them
        return _named(name, norm, x, residual=residual, relu=relu, **known)
    y = _named(name, norm, x)
    y = y if residual is None else y + residual
    return nnx.relu(y) if relu else y


def _convolved(layers: nnx.Module, conv: str, norm: str, x: jax.Array, **how: Any) -> jax.Array:
    """`_normalised` behind a convolution, both by the names that they have in `layers`."""
    convolve = functools.partial(_named, conv, getattr(layers, conv))
    y, moments = with_moments(getattr(layers, norm), convolve, x)
    return _normalised(norm, getattr(layers, norm), y, moments=moments, **how)


class Block(nnx.Module):
    """Convolutions, each with a BatchNorm behind it, and a shortcut around them.

    Where the shape changes, the shortcut is a 1 × 1 convolution with BatchNorm.

    Args:
        layers: by name: `conv1`, `norm1`, `conv2` and so on, and `shortcut`, `shortcut_norm`.
        rngs: the stream `params` initialises them in that order.
    """

    def __init__(self, *, rngs: nnx.Rngs, **layers: Make):
        self.depth = sum(name.startswith("conv") for name in layers)
        for name, make in layers.items():
            setattr(self, name, make(rngs=rngs))
        for name in {"shortcut", "shortcut_norm"} - layers.keys():
            setattr(self, name, nnx.data(None))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, in_channels)` to `(N, H / strides, W / strides, out_channels)`."""
        y = x
        if self.shortcut is not None:
            x = _convolved(self, "shortcut", "shortcut_norm", x, relu=False)
        for number in range(1, self.depth + 1):
            residual = x if number == self.depth else None
            y = _convolved(self, f"conv{number}", f"norm{number}", y, residual=residual)
        return y


class PreactivationBlock(Block):
    """Convolutions, each with BatchNorm and ReLU before it, and a shortcut around them.

    Where the shape changes, the shortcut is a 1 × 1 convolution behind the first of these ReLUs.
    """

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, in_channels)` to `(N, H / strides, W / strides, out_channels)`."""
        y, moments = x, None
        for number in range(1, self.depth + 1):
            y = _normalised(f"norm{number}", getattr(self, f"norm{number}"), y, moments=moments)
            if number == 1 and self.shortcut is not None:
                x = _named("shortcut", self.shortcut, y)
            convolve = functools.partial(_named, f"conv{number}", getattr(self, f"conv{number}"))
            y, moments = with_moments(getattr(self, f"norm{number + 1}", None), convolve, y)
        return x + y


_BLOCKS = {"basic": Block, "bottleneck": Block, "preactivation": PreactivationBlock}


class PlainStem(nnx.Module):
    """A 3 × 3 convolution with bias and ReLU: the original's, for images of 32 × 32."""

    def __init__(self, conv: Make, *, rngs: nnx.Rngs):
        # The second key for the kernel, the first for the bias, which layers draw the other way
        # round: a seed always gave this network these parameters.
        keys = [rngs.params(), rngs.params()]
        first = types.SimpleNamespace(params=lambda: keys.pop() if keys else rngs.params())
        self.conv = conv(rngs=first)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, in_channels)` to `(N, H, W, width)`."""
        return nnx.relu(_named("conv", self.conv, x))


class SmallStem(nnx.Module):
    """A 3 × 3 convolution, BatchNorm and ReLU, or without `norm` the convolution alone."""

    def __init__(self, conv: Make, norm: Make | None = None, *, rngs: nnx.Rngs):
        self.conv = conv(rngs=rngs)
        self.norm = nnx.data(norm and norm(rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, in_channels)` to `(N, H, W, width)`."""
        if self.norm is None:
            return _named("conv", self.conv, x)
        return _convolved(self, "conv", "norm", x)


class PooledStem(SmallStem):
    """A 7 × 7 convolution of stride 2, BatchNorm, ReLU and max pooling: ImageNet's."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, in_channels)` to `(N, H / 4, W / 4, width)`."""
        x = super().__call__(x)
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


_STEMS = {"plain": PlainStem, "small": SmallStem, "pooled": PooledStem}


def cifar_resnet(depth: int) -> ResNetConfig:
    """The residual network of so many layers for small images, built as `bsconv` builds its own.

    It is He et al.'s for CIFAR-10, but that shortcuts are 1 × 1 convolutions where the shape
    changes.

    Args:
        depth: 6n + 2, as 20, 32, 44, 56 or 110: three stages of n blocks.

    Raises:
        ValueError: if it is another.
    """
    count = _blocks_of_depth(depth, 2)
    return ResNetConfig(ChannelSelectionConv, 10, (count,) * 3, 16, "small", **_AS_BSCONV)


def wide_resnet(depth: int, widening: int) -> ResNetConfig:
    """WRN-depth-widening for small images, built as `bsconv` builds its own.

    Args:
        depth: 6n + 4, as 16, 28 or 40: three stages of n blocks.
        widening: the first stage has 16 · `widening` channels, the stem always 16.

    Raises:
        ValueError: if `depth` is another, or `widening` is no integer of at least 1.
    """
    count, width = _blocks_of_depth(depth, 4), 16 * positive("widening", widening)
    return ResNetConfig(
        ChannelSelectionConv,
        10,
        (count,) * 3,
        width,
        "small",
        "preactivation",
        stem_width=16,
        **_AS_BSCONV,
    )


_AS_BSCONV = {"input_norm": True, "replaced": "3x3"}


def _blocks_of_depth(depth: int, others: int) -> int:
    """How many blocks of two layers each of three stages has, beside so many other layers."""
    blocks, rest = divmod(positive("depth", depth) - others, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth={depth} must be 6n + {others} with n of at least 1")
    return blocks


_RESNET18 = ResNetConfig(ChannelSelectionConv, 1000, (2, 2, 2, 2), 64, "pooled")

PRESETS = {
    "resnet14": ResNetConfig(
        ChannelSelectionConv, 3, blocks=(2, 2, 2), width=16, stem="plain", dropout_rate=0.2
    ),
    "resnet18": _RESNET18,
    "resnet34": dataclasses.replace(_RESNET18, blocks=(3, 4, 6, 3)),
    "resnet50": dataclasses.replace(_RESNET18, blocks=(3, 4, 6, 3), block="bottleneck"),
    "cifar_resnet20": cifar_resnet(20),
    "cifar_resnet32": cifar_resnet(32),
    "cifar_resnet44": cifar_resnet(44),
    "cifar_resnet56": cifar_resnet(56),
    "cifar_resnet110": cifar_resnet(110),
    "cifar_wrn16_1": wide_resnet(16, 1),
    "cifar_wrn16_2": wide_resnet(16, 2),
    "cifar_wrn40_1": wide_resnet(40, 1),
    "cifar_wrn28_2": wide_resnet(28, 2),
    "cifar_wrn28_10": wide_resnet(28, 10),
}
"""The networks that have a name. `dataclasses.replace` makes others of their kind."""

Model = Literal[tuple(PRESETS)]  # what a command's --model takes


def make_network(
    name: str,
    conv: Callable[..., nnx.Module] | None = None,
    num_classes: int | None = None,
    *,
    rngs: nnx.Rngs,
    **changes: Any,
) -> ResNet:
    """The network of that name in `PRESETS`, with changes.

    Args:
        name: as `"cifar_resnet20"`.
        conv: the convolution; by default the preset's, `ChannelSelectionConv`.
        num_classes: the number of logits; by default the preset's.
        rngs: the streams `params` and `dropout`.
        changes: other fields of `ResNetConfig`; of those not given, the preset's.

    Raises:
        ValueError: naming the argument that is wrong, and its value.
    """
    if name not in PRESETS:
        raise ValueError(f"name={name!r} must be one of {', '.join(map(repr, PRESETS))}")
    changes |= {} if conv is None else {"conv": conv}
    changes |= {} if num_classes is None else {"num_classes": num_classes}
    return ResNet(dataclasses.replace(PRESETS[name], **changes), rngs=rngs)


def resnet14(
    conv: Callable[..., nnx.Module] | None = None,
    num_classes: int | None = None,
    *,
    rngs: nnx.Rngs,
    **changes: Any,
) -> ResNet:
    """The network of the original experiment, for small images: a plain stem and 3 × 2 blocks.

    27,363 parameters with `ChannelSelectionConv`, 174,787 with `SubKernelConv`. The arguments, and
    the error, are those of `make_network`.
    """
    return make_network("resnet14", conv, num_classes, rngs=rngs, **changes)


def resnet18(
    conv: Callable[..., nnx.Module] | None = None,
    num_classes: int | None = None,
    *,
    rngs: nnx.Rngs,
    **changes: Any,
) -> ResNet:
    """torchvision's ResNet-18, for images of 224 × 224: a max-pooled stem and 4 × 2 blocks.

    Every convolution is `conv`, the stem and the 1 × 1 shortcuts too: 1,954,024 parameters with
    `ChannelSelectionConv`, 11,689,512 with `SubKernelConv`. The arguments, and the error, are those
    of `make_network`.
    """
    return make_network("resnet18", conv, num_classes, rngs=rngs, **changes)
