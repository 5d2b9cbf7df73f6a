"""Residual networks that take their convolution as an argument.

He et al., "Deep Residual Learning for Image Recognition" (2015). Images are NHWC, logits `(N,
num_classes)`.
"""

import collections
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from chansel_jax.conv import BatchNorm, ChannelSelectionConv, SubKernelConv
from chansel_jax.ops.window import positive

CONVS = {"chansel": ChannelSelectionConv, "subkernel": SubKernelConv}
DENSE = (SubKernelConv, nnx.Conv)

he_normal = nnx.initializers.he_normal()  # for convolutions that ReLU follows

Make = Callable[..., nnx.Module]  # a layer's constructor; what it lacks is `rngs`


def unwrapped(conv: Callable[..., nnx.Module]) -> Callable[..., nnx.Module]:
    """What a `functools.partial`, or one of one, in the end calls."""
    while isinstance(conv, functools.partial):
        conv = conv.func
    return conv


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
        stem: `"plain"`, an ordinary 3 × 3 convolution with bias, whatever `conv` is; or `"pooled"`,
            a 7 × 7 `conv` of stride 2, BatchNorm and a max pooling of stride 2.
        rank: the rank of every `conv`, or a rank for each, in the network's order, where 0 makes
            it an ordinary convolution; but 1 × 1 shortcuts keep rank 1, and a pooled stem has at
            most the rank `in_channels`.
        use_bias: whether every `conv` has a bias before its BatchNorm.
        plain_shortcuts: whether the 1 × 1 shortcuts are ordinary convolutions, whatever `conv` is.
            With one weight for each output channel before a BatchNorm, the depthwise part of a
            1 × 1 channel selection expresses nothing more.
        dropout_rate: the share of pooled features dropped before the last layer while training.
        dtype: of the computation; the parameters and the logits stay float32.
        in_channels: channels of the images.
    """

    conv: Callable[..., nnx.Module]
    num_classes: int
    blocks: tuple[int, ...]
    width: int
    stem: Literal["plain", "pooled"]
    rank: int | tuple[int, ...] = 1
    use_bias: bool = False
    plain_shortcuts: bool = False
    dropout_rate: float = 0.0
    dtype: Dtype = jnp.float32
    in_channels: int = 3

    def __post_init__(self):
        for name in ("num_classes", "width", "in_channels"):
            positive(name, getattr(self, name))
        if not self.blocks:
            raise ValueError(f"blocks={self.blocks!r} must name at least one stage")
        for count in self.blocks:
            positive("blocks", count)
        if self.stem not in _STEMS:
            raise ValueError(f"stem={self.stem!r} must be one of {', '.join(map(repr, _STEMS))}")
        self._check_ranks()
        if not 0 <= self.dropout_rate < 1:
            raise ValueError(f"dropout_rate={self.dropout_rate} must be in [0, 1)")

    def _check_ranks(self) -> None:
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,)
        for rank in ranks:
            if rank != 0 or not isinstance(self.rank, tuple):
                positive("rank", rank)
        if max(ranks, default=1) > 9:
            raise ValueError(f"rank={self.rank} must be at most 9, the elements of a 3 × 3 kernel")
        if max(ranks, default=1) > 1 and unwrapped(self.conv) in DENSE:
            raise ValueError(f"rank={self.rank}: the dense convolution has no rank")
        count = 2 * sum(self.blocks) + (self.stem == "pooled")
        if isinstance(self.rank, tuple) and len(self.rank) != count:
            raise ValueError(f"rank={self.rank} must be one rank, or one for each of {count} convs")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every `conv` but the 1 × 1 shortcuts, in the network's order; 0 is dense."""
        if isinstance(self.rank, tuple):
            return self.rank
        stem = (min(self.rank, self.in_channels),) if self.stem == "pooled" else ()
        return stem + (self.rank,) * (2 * sum(self.blocks))

    @property
    def image_size(self) -> int:
        """The pixels, each way, of the images that such networks are made for; they take others."""
        return {"plain": 32, "pooled": 224}[self.stem]

    def layers(self) -> Iterator[Layer]:
        """Every layer that has parameters, in the order in which they are initialised."""
        given = {"use_bias": self.use_bias, "dtype": self.dtype}
        conv = functools.partial(_conv, self.conv, **given)
        shortcut = (
            functools.partial(_conv, SubKernelConv, **given) if self.plain_shortcuts else conv
        )
        norm = functools.partial(BatchNorm, self.width, dtype=self.dtype)
        ranks, inputs, outputs = iter(self.ranks), self.in_channels, self.width
        if self.stem == "plain":
            stem = _conv(SubKernelConv, inputs, outputs, 3, use_bias=True, dtype=self.dtype)
            yield Layer("stem.conv", stem, 1)
            reduction = 1
        else:
            yield Layer("stem.conv", conv(inputs, outputs, 7, strides=2, rank=next(ranks)), 1)
            yield Layer("stem.norm", norm, 2)
            reduction = 4
        stages = [stage for stage, count in enumerate(self.blocks) for _ in range(count)]
        for i, stage in enumerate(stages):
            inputs, outputs = outputs, self.width * 2**stage
            strides = 1 if inputs == outputs else 2
            path, before, reduction = f"blocks.{i}", reduction, reduction * strides
            conv1 = conv(inputs, outputs, 3, strides=strides, rank=next(ranks))
            conv2 = conv(outputs, outputs, 3, rank=next(ranks))
            norm = functools.partial(BatchNorm, outputs, dtype=self.dtype)
            yield Layer(f"{path}.conv1", conv1, before)
            yield Layer(f"{path}.norm1", norm, reduction)
            yield Layer(f"{path}.conv2", conv2, reduction)
            yield Layer(f"{path}.norm2", norm, reduction)
            if strides > 1:
                make = shortcut(inputs, outputs, 1, strides=strides)
                yield Layer(f"{path}.shortcut", make, before)
                yield Layer(f"{path}.shortcut_norm", norm, reduction)
        linear = functools.partial(nnx.Linear, outputs, self.num_classes, dtype=self.dtype)
        yield Layer("classifier", linear, reduction)


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
    part = "depthwise_init" if unwrapped(conv) is ChannelSelectionConv else "kernel_init"
    brought = getattr(conv, "keywords", {})
    return {} if {part, "kernel_init"} & brought.keys() else {part: he_normal}


class ResNet(nnx.Module):
    """Stem, stages of basic blocks, global average pooling, dropout, classifier.

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
        self.stem = _STEMS[config.stem](**parts["stem"], rngs=rngs)
        numbers = range(sum(config.blocks))
        self.blocks = nnx.List([BasicBlock(**parts[f"blocks.{i}"], rngs=rngs) for i in numbers])
        self.dropout = nnx.Dropout(config.dropout_rate, rngs=rngs)
        self.classifier = parts[""]["classifier"](rngs=rngs)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits `(N, num_classes)`, float32, of the images `x` `(N, H, W, in_channels)`.

        Args:
            x: the images, normalised.
            rngs: the stream `dropout` takes the place of the network's own while training.
        """
        x = _named("stem", self.stem, x)
        for number, block in enumerate(self.blocks):
            x = _named(f"blocks.{number}", block, x)
        x = jnp.mean(x, axis=(1, 2))
        x = self.dropout(x, rngs=rngs)
        return _named("classifier", self.classifier, x).astype(jnp.float32)


def _named(name: str, layer: nnx.Module, x: jax.Array) -> jax.Array:
    """`layer(x)`; a profile shows its operations under that name."""
    with jax.named_scope(name):
        return layer(x)


class BasicBlock(nnx.Module):
    """Two 3 × 3 convolutions, each with BatchNorm, and a shortcut around them.

    Where the width changes, the shortcut is a 1 × 1 convolution with BatchNorm.
    """

    def __init__(
        self,
        conv1: Make,
        norm1: Make,
        conv2: Make,
        norm2: Make,
        shortcut: Make | None = None,
        shortcut_norm: Make | None = None,
        *,
        rngs: nnx.Rngs,
    ):
        self.conv1 = conv1(rngs=rngs)
        self.norm1 = norm1(rngs=rngs)
        self.conv2 = conv2(rngs=rngs)
        self.norm2 = norm2(rngs=rngs)
        self.shortcut = nnx.data(shortcut and shortcut(rngs=rngs))
        self.shortcut_norm = nnx.data(shortcut_norm and shortcut_norm(rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, in_channels)` to `(N, H / strides, W / strides, out_channels)`."""
        y = nnx.relu(_named("norm1", self.norm1, _named("conv1", self.conv1, x)))
        y = _named("norm2", self.norm2, _named("conv2", self.conv2, y))
        if self.shortcut is not None:
            x = _named("shortcut", self.shortcut, x)
            x = _named("shortcut_norm", self.shortcut_norm, x)
        return nnx.relu(x + y)


class PlainStem(nnx.Module):
    """An ordinary 3 × 3 convolution with bias and ReLU: the original's, for images of 32 × 32."""

    def __init__(self, conv: Make, *, rngs: nnx.Rngs):
        # The second key for the kernel, the first for the bias, which layers draw the other way
        # round: a seed always gave this network these parameters.
        keys = (rngs.params(), rngs.params())
        self.conv = conv(rngs=types.SimpleNamespace(params=reversed(keys).__next__))

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, in_channels)` to `(N, H, W, width)`."""
        return nnx.relu(_named("conv", self.conv, x))


class PooledStem(nnx.Module):
    """A 7 × 7 convolution of stride 2, BatchNorm, ReLU and max pooling: ImageNet's."""

    def __init__(self, conv: Make, norm: Make, *, rngs: nnx.Rngs):
        self.conv = conv(rngs=rngs)
        self.norm = norm(rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, in_channels)` to `(N, H / 4, W / 4, width)`."""
        x = nnx.relu(_named("norm", self.norm, _named("conv", self.conv, x)))
        return nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


_STEMS = {"plain": PlainStem, "pooled": PooledStem}


PRESETS = {
    "resnet14": ResNetConfig(
        ChannelSelectionConv, 3, blocks=(2, 2, 2), width=16, stem="plain", dropout_rate=0.2
    ),
    "resnet18": ResNetConfig(
        ChannelSelectionConv, 1000, blocks=(2, 2, 2, 2), width=64, stem="pooled"
    ),
}
"""The networks that have a name. `dataclasses.replace` makes others of their kind."""

Model = Literal[tuple(PRESETS)]  # what a command's --model takes


def _builder(name: str, about: str) -> Callable[..., ResNet]:
    """A function of the preset's `name` that builds it, with changes."""
    preset = PRESETS[name]

    def build(
        conv: Callable[..., nnx.Module] = preset.conv,
        num_classes: int = preset.num_classes,
        *,
        rngs: nnx.Rngs,
        **changes: Any,
    ) -> ResNet:
        config = dataclasses.replace(preset, conv=conv, num_classes=num_classes, **changes)
        return ResNet(config, rngs=rngs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""{about}

    The arguments are the fields of `ResNetConfig`; of those not given, the preset's.

    Raises:
        ValueError: naming the argument that is wrong, and its value.
    """
    return build


resnet14 = _builder(
    "resnet14",
    """The network of the original experiment, for small images: a plain stem and 3 × 2 blocks.

    27,363 parameters with `ChannelSelectionConv`, 174,787 with `SubKernelConv`.""",
)
resnet18 = _builder(
    "resnet18",
    """torchvision's ResNet-18, for images of 224 × 224: a max-pooled stem and 4 × 2 blocks.

    Every convolution is `conv`, the stem and the 1 × 1 shortcuts too: 1,954,024 parameters with
    `ChannelSelectionConv`, 11,689,512 with `SubKernelConv`.""",
)
