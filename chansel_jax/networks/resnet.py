"""Residual networks that take their convolution as an argument.

He et al., "Deep Residual Learning for Image Recognition" (2015). Images are NHWC, logits `(N,
num_classes)`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from chansel_jax.conv import BatchNorm, ChannelSelectionConv, SubKernelConv
from chansel_jax.ops.window import positive

CONVS = {"chansel": ChannelSelectionConv, "subkernel": SubKernelConv}

MAX_POOL = {"window_shape": (3, 3), "strides": (2, 2), "padding": ((1, 1), (1, 1))}


def unwrapped(conv: Callable[..., nnx.Module]) -> Callable[..., nnx.Module]:
    """What a `functools.partial`, or one of one, in the end calls."""
    while isinstance(conv, functools.partial):
        conv = conv.func
    return conv


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """What a `ResNet` is built from.

    Attributes:
        conv: the convolution, called as `SubKernelConv` is.
        num_classes: the number of logits.
        blocks: residual blocks in each stage; every stage but the first halves the image.
        width: channels of the first stage; every further stage doubles them.
        stem: `"plain"`, an ordinary 3 × 3 convolution with bias, whatever `conv` is; or `"pooled"`,
            a 7 × 7 `conv` of stride 2, BatchNorm and a max pooling of stride 2.
        rank: the rank of every `conv`, or a rank for each, in the network's order; but 1 × 1
            shortcuts keep rank 1, and a pooled stem has at most the rank `in_channels`.
        use_bias: whether every `conv` has a bias before its BatchNorm.
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
            positive("rank", rank)
        if max(ranks, default=1) > 9:
            raise ValueError(f"rank={self.rank} must be at most 9, the elements of a 3 × 3 kernel")
        if max(ranks, default=1) > 1 and unwrapped(self.conv) is SubKernelConv:
            raise ValueError(f"rank={self.rank}: the dense convolution has no rank")
        count = 2 * sum(self.blocks) + (self.stem == "pooled")
        if isinstance(self.rank, tuple) and len(self.rank) != count:
            raise ValueError(f"rank={self.rank} must be one rank, or one for each of {count} convs")

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank of every `conv` but the 1 × 1 shortcuts, in the network's order."""
        if isinstance(self.rank, tuple):
            return self.rank
        stem = (min(self.rank, self.in_channels),) if self.stem == "pooled" else ()
        return stem + (self.rank,) * (2 * sum(self.blocks))


class ResNet(nnx.Module):
    """Stem, stages of basic blocks, global average pooling, dropout, dense layer.

    Args:
        config: the network's shape.
        rngs: the streams `params` (initialisation) and `dropout` (masks while training).
    """

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        self.config = config
        ranks = iter(config.ranks)
        self.stem = _STEMS[config.stem](config, ranks, rngs)
        blocks, channels = [], config.width
        for stage, count in enumerate(config.blocks):
            for i in range(count):
                strides = 2 if stage > 0 and i == 0 else 1
                out_channels = config.width * 2**stage
                blocks.append(
                    BasicBlock(config, channels, out_channels, ranks, strides=strides, rngs=rngs)
                )
                channels = out_channels
        self.blocks = nnx.List(blocks)
        self.dropout = nnx.Dropout(config.dropout_rate, rngs=rngs)
        self.dense = nnx.Linear(channels, config.num_classes, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits `(N, num_classes)`, float32, of the images `x` `(N, H, W, in_channels)`.

        Args:
            x: the images, normalised.
            rngs: the stream `dropout` takes the place of the network's own while training.
        """
        x = self.stem(x.astype(self.config.dtype))
        for block in self.blocks:
            x = block(x)
        x = jnp.mean(x, axis=(1, 2))
        x = self.dropout(x, rngs=rngs)
        return self.dense(x).astype(jnp.float32)


class BasicBlock(nnx.Module):
    """Two 3 × 3 convolutions, each with BatchNorm, and a shortcut around them.

    Where the width changes, the shortcut is a 1 × 1 convolution of the same kind with BatchNorm.
    """

    def __init__(
        self,
        config: ResNetConfig,
        in_channels: int,
        out_channels: int,
        ranks: Iterator[int],
        *,
        strides: int,
        rngs: nnx.Rngs,
    ):
        conv = functools.partial(_conv, config, rngs=rngs)
        norm = functools.partial(BatchNorm, out_channels, dtype=config.dtype, rngs=rngs)
        self.conv1 = conv(
            in_channels, out_channels, 3, strides=strides, padding=1, rank=next(ranks)
        )
        self.norm1 = norm()
        self.conv2 = conv(out_channels, out_channels, 3, padding=1, rank=next(ranks))
        self.norm2 = norm()
        changes = strides != 1 or in_channels != out_channels
        self.shortcut = nnx.data(
            conv(in_channels, out_channels, 1, strides=strides, padding=0) if changes else None
        )
        self.shortcut_norm = nnx.data(norm() if changes else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, in_channels)` to `(N, H / strides, W / strides, out_channels)`."""
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        if self.shortcut is not None:
            x = self.shortcut_norm(self.shortcut(x))
        return nnx.relu(x + y)


class PlainStem(nnx.Module):
    """An ordinary 3 × 3 convolution with bias and ReLU: the original's, for images of 32 × 32."""

    def __init__(self, config: ResNetConfig, ranks: Iterator[int], rngs: nnx.Rngs):
        self.conv = SubKernelConv(
            config.in_channels, config.width, 3, padding=1, dtype=config.dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, in_channels)` to `(N, H, W, width)`."""
        return nnx.relu(self.conv(x))


class PooledStem(nnx.Module):
    """A 7 × 7 convolution of stride 2, BatchNorm, ReLU and max pooling: ImageNet's."""

    def __init__(self, config: ResNetConfig, ranks: Iterator[int], rngs: nnx.Rngs):
        self.conv = _conv(
            config,
            config.in_channels,
            config.width,
            7,
            strides=2,
            padding=3,
            rank=next(ranks),
            rngs=rngs,
        )
        self.norm = BatchNorm(config.width, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, in_channels)` to `(N, H / 4, W / 4, width)`."""
        x = nnx.relu(self.norm(self.conv(x)))
        return nnx.max_pool(x, **MAX_POOL)


_STEMS = {"plain": PlainStem, "pooled": PooledStem}


def resnet14(
    conv: Callable[..., nnx.Module] = ChannelSelectionConv,
    num_classes: int = 3,
    *,
    width: int = 16,
    rank: int | tuple[int, ...] = 1,
    use_bias: bool = False,
    dropout_rate: float = 0.2,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """The network of the original experiment, for small images: a plain stem and 3 × 2 blocks.

    27,363 parameters with `ChannelSelectionConv`, 174,787 with `SubKernelConv`. The arguments are
    the fields of `ResNetConfig`.

    Raises:
        ValueError: naming the argument that is wrong, and its value.
    """
    config = ResNetConfig(
        conv=conv,
        num_classes=num_classes,
        blocks=(2, 2, 2),
        width=width,
        stem="plain",
        rank=rank,
        use_bias=use_bias,
        dropout_rate=dropout_rate,
        dtype=dtype,
    )
    return ResNet(config, rngs=rngs)


def resnet18(
    conv: Callable[..., nnx.Module] = ChannelSelectionConv,
    num_classes: int = 1000,
    *,
    width: int = 64,
    rank: int | tuple[int, ...] = 1,
    use_bias: bool = False,
    dropout_rate: float = 0.0,
    dtype: Dtype = jnp.float32,
    rngs: nnx.Rngs,
) -> ResNet:
    """torchvision's ResNet-18, for images of 224 × 224: a max-pooled stem and 4 × 2 blocks.

    Every convolution is `conv`, the stem and the 1 × 1 shortcuts too: 1,954,024 parameters with
    `ChannelSelectionConv`, 11,689,512 with `SubKernelConv`. The arguments are the fields of
    `ResNetConfig`.

    Raises:
        ValueError: naming the argument that is wrong, and its value.
    """
    config = ResNetConfig(
        conv=conv,
        num_classes=num_classes,
        blocks=(2, 2, 2, 2),
        width=width,
        stem="pooled",
        rank=rank,
        use_bias=use_bias,
        dropout_rate=dropout_rate,
        dtype=dtype,
    )
    return ResNet(config, rngs=rngs)


PRESETS = {"resnet14": resnet14, "resnet18": resnet18}
IMAGE_SIZES = {"resnet14": 32, "resnet18": 224}  # pixels each way that they are made for


def _conv(
    config: ResNetConfig,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    strides: int = 1,
    padding: int,
    rank: int = 1,
    rngs: nnx.Rngs,
) -> nnx.Module:
    return config.conv(
        in_channels,
        out_channels,
        kernel_size,
        strides=strides,
        padding=padding,
        use_bias=config.use_bias,
        dtype=config.dtype,
        rngs=rngs,
        **({"rank": rank} if rank > 1 else {}),
    )
