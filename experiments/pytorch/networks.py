"""The layers and networks of `chansel_jax` in plain `torch.nn`, named as torchvision names them."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

KINDS = ("chansel", "subspace", "subkernel")


class WeightedSumConv2d(nn.Module):
    """Channel selection of rank R: `nn.Linear` over the channels, then a grouped `nn.Conv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        rank: int = 1,
        norm: bool = False,
    ):
        super().__init__()
        self.fc = nn.Linear(in_channels, out_channels * rank, bias=False)
        self.bn = nn.BatchNorm2d(out_channels * rank) if norm else nn.Identity()
        self.conv2d = nn.Conv2d(
            out_channels * rank,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=out_channels,
            bias=bias,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(N, C_in, H, W)` to `(N, C_out, H_out, W_out)`."""
        selected = self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.conv2d(self.bn(selected))


class SubspaceConv2d(nn.Module):
    """Channel selection whose `nn.Linear` is two, with a quarter of the channels in between."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        bias: bool = True,
        rank: int = 1,
        norm: bool = False,
        share: float = 0.25,
    ):
        super().__init__()
        inner = min(in_channels, max(4, math.ceil(share * in_channels)))
        selected = out_channels * rank
        self.subspace = nn.Linear(in_channels, inner, bias=False)
        self.subspace_bn = nn.BatchNorm2d(inner) if norm else nn.Identity()
        self.fc = nn.Linear(inner, selected, bias=False)
        self.bn = nn.BatchNorm2d(selected) if norm else nn.Identity()
        self.conv2d = nn.Conv2d(
            selected,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            groups=out_channels,
            bias=bias,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(N, C_in, H, W)` to `(N, C_out, H_out, W_out)`."""
        x = self.subspace_bn(self.subspace(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))
        return self.conv2d(self.bn(self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)))


class TorchBlock(nn.Module):
    """Convolutions, each with BatchNorm behind it, and a shortcut around them.

    Args:
        convs: channels in and out of each convolution, and the convolution.
        shortcut: what the block's input goes through; None leaves it as it is.
    """

    def __init__(self, convs: Sequence[tuple[int, int, nn.Module]], shortcut: nn.Sequential | None):
        super().__init__()
        self.depth = len(convs)
        for number, (inputs, outputs, conv) in enumerate(convs, 1):
            self.add_module(f"conv{number}", conv)
            self.add_module(f"bn{number}", nn.BatchNorm2d(self.normalised(inputs, outputs)))
        self.downsample = shortcut

    @staticmethod
    def normalised(inputs: int, outputs: int) -> int:
        """The channels that a convolution's BatchNorm has."""
        return outputs

    def parts(self) -> list[tuple[nn.Module, nn.Module]]:
        """Each convolution with its BatchNorm."""
        numbers = range(1, self.depth + 1)
        return [(getattr(self, f"conv{n}"), getattr(self, f"bn{n}")) for n in numbers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *first, (last, last_norm) = self.parts()
        y = x
        for conv, norm in first:
            y = torch.relu(norm(conv(y)))
        y = last_norm(last(y))
        return torch.relu((x if self.downsample is None else self.downsample(x)) + y)


class TorchPreactivationBlock(TorchBlock):
    """Convolutions, each with BatchNorm and ReLU before it, and a shortcut around them."""

    @staticmethod
    def normalised(inputs: int, outputs: int) -> int:
        """The channels that a convolution's BatchNorm has."""
        return inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for number, (conv, norm) in enumerate(self.parts()):
            y = torch.relu(norm(y))
            if number == 0 and self.downsample is not None:
                x = self.downsample(y)
            y = conv(y)
        return x + y


class TorchResNet(nn.Module):
    """`chansel_jax.ResNet`, for images `(N, 3, H, W)`.

    `kind` is one of `KINDS`; the rest is as in `chansel_jax.ResNetConfig`, where a rank of 0 is an
    ordinary convolution too; `norm` and `share` are those of every channel selection, the latter
    if it is from a subspace.
    """

    def __init__(
        self,
        kind: str,
        *,
        num_classes: int,
        blocks: Sequence[int],
        width: int,
        stem: str,
        block: str = "basic",
        stem_width: int | None = None,
        input_norm: bool = False,
        replaced: str = "all",
        rank: int | Sequence[int] = 1,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        norm: bool = False,
        share: float = 0.25,
    ):
        super().__init__()
        channels, preactivation = stem_width or width, block == "preactivation"
        in_stem = "subkernel" if stem == ("pooled" if replaced == "3x3" else "plain") else kind
        point = "subkernel" if replaced != "all" else kind
        ranks = itertools.repeat(rank) if isinstance(rank, int) else iter(rank)
        self.data_bn = nn.BatchNorm2d(3) if input_norm else nn.Identity()
        options = {"bias": use_bias, "norm": norm, "share": share}
        of_stem = {**options, "bias": use_bias or stem == "plain"}
        large = {"kernel_size": 7, "stride": 2} if stem == "pooled" else {"kernel_size": 3}
        stem_rank = 1 if in_stem == "subkernel" else next(ranks)
        self.conv1 = _conv(in_stem, 3, channels, rank=stem_rank, **of_stem, **large)
        alone = stem == "small" and preactivation
        self.bn1 = nn.Identity() if alone or stem == "plain" else nn.BatchNorm2d(channels)
        self.relu = nn.Identity() if alone else nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if stem == "pooled" else nn.Identity()
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage * (4 if block == "bottleneck" else 1)
            made = nn.Sequential()
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                sizes = channels, outputs, stride
                made.append(_block(block, (kind, point), sizes, ranks, options))
                channels = outputs
            self.add_module(f"layer{stage + 1}", made)
        self.stages = len(blocks)
        self.last_bn = nn.BatchNorm2d(channels) if preactivation else None
        self.dropout = nn.Dropout(dropout_rate)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `(N, num_classes)`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.data_bn(x)))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        if self.last_bn is not None:
            x = torch.relu(self.last_bn(x))
        return self.fc(self.dropout(x.mean((2, 3))))


NETWORK_ARGUMENTS = (
    "num_classes",
    "blocks",
    "width",
    "stem",
    "block",
    "stem_width",
    "input_norm",
    "replaced",
    "rank",
    "use_bias",
    "dropout_rate",
)
"""Of `TorchResNet`, each a field of `chansel_jax.ResNetConfig`."""


def torch_twin(kind: str, config: Any) -> TorchResNet:
    """`chansel_jax.ResNet(config)`, whose convolutions are of `kind`."""
    brought = getattr(config.conv, "keywords", {})
    of_conv = {name: brought[name] for name in ("norm", "share") if name in brought}
    arguments = {name: getattr(config, name) for name in NETWORK_ARGUMENTS}
    return TorchResNet(kind, **arguments, **of_conv)


def _block(
    block: str,
    kinds: tuple[str, str],
    sizes: tuple[int, int, int],
    ranks: Iterator[int],
    options: Mapping[str, Any],
) -> TorchBlock:
    """A block of channels in, channels out and stride, with convolutions of the kinds.

    The first of `kinds` is that of the 3 × 3 convolutions, which have the next of `ranks`, the
    second that of the 1 × 1 ones.
    """
    (kind, point), (inputs, outputs, stride) = kinds, sizes
    if block == "bottleneck":
        inner = outputs // 4
        shapes = ((inputs, inner, 1, 1), (inner, inner, 3, stride), (inner, outputs, 1, 1))
    else:
        shapes = ((inputs, outputs, 3, stride), (outputs, outputs, 3, 1))
    convs = [
        (shape[0], shape[1], _conv(point, *shape, rank=1, **options))
        if shape[2] == 1
        else (shape[0], shape[1], _conv(kind, *shape, rank=next(ranks), **options))
        for shape in shapes
    ]
    preactivation, shortcut = block == "preactivation", None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(_conv(point, inputs, outputs, 1, stride, rank=1, **options))
        if not preactivation:
            shortcut.append(nn.BatchNorm2d(outputs))
    return (TorchPreactivationBlock if preactivation else TorchBlock)(convs, shortcut)


def _conv(
    kind: str,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    *,
    rank: int,
    bias: bool,
    norm: bool,
    share: float,
) -> nn.Module:
    sizes = in_channels, out_channels, kernel_size
    window = {"stride": stride, "padding": kernel_size // 2, "bias": bias}
    if kind == "subkernel" or rank == 0:
        return nn.Conv2d(*sizes, **window)
    options = {"rank": min(rank, in_channels, kernel_size**2), "norm": norm}
    if kind == "subspace":
        return SubspaceConv2d(*sizes, **window, **options, share=share)
    return WeightedSumConv2d(*sizes, **window, **options)
