"""The layers and networks of `chansel_jax` in plain `torch.nn`, named as torchvision names them."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

KINDS = ("chansel", "subkernel")


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


class TorchBasicBlock(nn.Module):
    """Two 3 × 3 convolutions, each with BatchNorm, and a shortcut around them."""

    def __init__(self, conv, shortcut, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv(in_channels, out_channels, 3, stride=stride, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv(out_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                shortcut(in_channels, out_channels, 1, stride=stride), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return torch.relu(self.downsample(x) + y)


class TorchResNet(nn.Module):
    """`chansel_jax.ResNet`, for images `(N, 3, H, W)`.

    `kind` is "chansel" or "subkernel", `stem` "plain" or "pooled"; the rest is as in
    `chansel_jax.ResNetConfig`, where a rank of 0 is an ordinary convolution too.
    """

    def __init__(
        self,
        kind: str,
        *,
        num_classes: int,
        blocks: Sequence[int],
        width: int,
        stem: str,
        rank: int | Sequence[int] = 1,
        use_bias: bool = False,
        plain_shortcuts: bool = False,
        dropout_rate: float = 0.0,
    ):
        super().__init__()
        ranks = itertools.repeat(rank) if isinstance(rank, int) else iter(rank)

        def conv(*sizes, **window):
            return _conv(kind, next(ranks), use_bias, *sizes, **window)

        shortcut = functools.partial(_conv, kind, 0 if plain_shortcuts else 1, use_bias)
        if stem == "plain":
            self.conv1 = nn.Conv2d(3, width, 3, padding=1)
            self.bn1 = nn.Identity()
            self.maxpool = nn.Identity()
        else:
            self.conv1 = conv(3, width, 7, stride=2, padding=3)
            self.bn1 = nn.BatchNorm2d(width)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = width
        for stage, count in enumerate(blocks):
            out_channels = width * 2**stage
            layer = []
            for i in range(count):
                stride = 2 if stage > 0 and i == 0 else 1
                layer.append(TorchBasicBlock(conv, shortcut, channels, out_channels, stride))
                channels = out_channels
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layer))
        self.stages = len(blocks)
        self.dropout = nn.Dropout(dropout_rate)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits `(N, num_classes)`."""
        x = self.maxpool(torch.relu(self.bn1(self.conv1(x))))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        return self.fc(self.dropout(x.mean((2, 3))))


def torch_twin(kind: str, config: Any) -> TorchResNet:
    """`chansel_jax.ResNet(config)`, whose convolutions are of `kind`."""
    names = ("num_classes", "blocks", "width", "stem", "rank", "use_bias", "plain_shortcuts")
    given = {name: getattr(config, name) for name in names}
    return TorchResNet(kind, dropout_rate=config.dropout_rate, **given)


def _conv(
    kind: str,
    rank: int,
    bias: bool,
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    stride: int = 1,
    padding: int = 0,
) -> nn.Module:
    if kind == "subkernel" or rank == 0:
        return nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, bias=bias
        )
    return WeightedSumConv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=padding,
        bias=bias,
        rank=min(rank, in_channels, kernel_size**2),
    )
