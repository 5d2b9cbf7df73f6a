"""Parameters and multiply-adds of layers, and of our networks, in closed form.

No network is built and nothing is traced. Multiply-adds are those of one image.
"""

import dataclasses
import math

from flax import nnx

from chansel_jax.conv import SHARE, SubspaceChannelSelectionConv, subspace_size, unwrapped
from chansel_jax.networks.resnet import CONVS, DENSE, Layer, ResNetConfig
from chansel_jax.ops.window import Pair, per_axis, positive


@dataclasses.dataclass(frozen=True)
class LayerCount:
    """What one layer costs.

    Attributes:
        name: the layer's path in its network, as in `"blocks.2.shortcut"`.
        kind: `"subkernel"`, `"chansel"`, `"subspace"`, `"batch_norm"` or `"linear"`.
        output: shape of the output for one image: `(H, W, C)`, or `(num_classes,)`.
        parameters: what is learned; running statistics are not.
        multiply_adds: multiplications with an addition, for one image.
    """

    name: str
    kind: str
    output: tuple[int, ...]
    parameters: int
    multiply_adds: int


def subkernel_cost(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Pair,
    *,
    output_size: int | Pair,
    use_bias: bool = True,
    feature_group_count: int = 1,
) -> tuple[int, int]:
    """Parameters and multiply-adds of the dense convolution.

    With I, O channels, K = K_h·K_w and an output of P = H_out·W_out pixels: I·O·K parameters, O
    more for the bias, and P·I·O·K multiply-adds. With G groups I is the input channels of one.

    Raises:
        ValueError: if a size is neither an integer of at least 1 nor a pair of them.
    """
    selected_from = in_channels // feature_group_count
    weights = selected_from * out_channels * math.prod(per_axis("kernel_size", kernel_size))
    pixels = math.prod(per_axis("output_size", output_size))
    return weights + use_bias * out_channels, pixels * weights


def chansel_cost(
    in_channels: int,
    out_channels: int,
    kernel_size: int | Pair,
    *,
    input_size: int | Pair,
    output_size: int | Pair,
    rank: int = 1,
    use_bias: bool = True,
    norm: bool = False,
    share: float | None = None,
    feature_group_count: int = 1,
) -> tuple[int, int]:
    """Parameters and multiply-adds of channel selection of rank R.

    The pointwise part has I·O·R parameters and runs at the size of the input, the depthwise part
    has O·R·K and runs at the size of the output: H·W·I·O·R + H_out·W_out·O·R·K multiply-adds. A
    bias has O parameters more, normalisation between the parts 2·O·R.

    With a `share`, it is channel selection from a subspace of M = min(I, max(4, ⌈share·I⌉))
    channels: there are I·M + M·O·R in the place of I·O·R, and normalisation has 2·M more.

    With G groups I is the input channels of one, and each has M channels of its own.

    Raises:
        ValueError: if channels or rank are no integers of at least 1, a size is neither that nor a
            pair of them, or `share` is not in (0, 1].
    """
    named = {"in_channels": in_channels, "out_channels": out_channels, "rank": rank}
    for name, value in named.items():
        positive(name, value)
    selected, selected_from = out_channels * rank, in_channels // feature_group_count
    inner = 0 if share is None else subspace_size(selected_from, share)
    pointwise = inner * (in_channels + selected) if inner else selected_from * selected
    depthwise = selected * math.prod(per_axis("kernel_size", kernel_size))
    normalised = selected + inner * feature_group_count
    parameters = pointwise + depthwise + use_bias * out_channels + norm * 2 * normalised
    pixels_in = math.prod(per_axis("input_size", input_size))
    pixels_out = math.prod(per_axis("output_size", output_size))
    return parameters, pixels_in * pointwise + pixels_out * depthwise


def break_even(kernel_size: int | Pair) -> float:
    """The input channels above which channel selection of rank 1 has the fewer parameters.

    I·O·K > I·O + O·K exactly if I > K / (K - 1), with K = K_h·K_w; infinite for a 1 × 1 kernel.

    Raises:
        ValueError: if `kernel_size` is neither an integer of at least 1 nor a pair of them.
    """
    elements = math.prod(per_axis("kernel_size", kernel_size))
    return elements / (elements - 1) if elements > 1 else math.inf


def count_network(config: ResNetConfig, image_size: int | Pair) -> list[LayerCount]:
    """One row a layer of `ResNet(config)` for images of `image_size` (H, W), in its own order.

    A block's shortcut follows its main path. The columns of the rows add up to the network's.

    Raises:
        ValueError: if `config.conv` is none of the three convolutions, nor `nnx.Conv`, nor a
            `functools.partial` of one, or `image_size` is neither an integer of at least 1 nor a
            pair of them.
    """
    if not isinstance(config, ResNetConfig):
        raise ValueError(f"config={config!r} must be a ResNetConfig, as in PRESETS")
    if unwrapped(config.conv) not in (*CONVS.values(), nnx.Conv):
        raise ValueError(
            f"conv={config.conv!r} must be one of {', '.join(k.__name__ for k in CONVS.values())}, "
            "nnx.Conv or a functools.partial of one: of another layer no closed form is known"
        )
    size = per_axis("image_size", image_size)
    return [_count_layer(layer, size) for layer in config.layers()]


def _count_layer(layer: Layer, image_size: Pair) -> LayerCount:
    make, given = unwrapped(layer.make), layer.make.keywords
    if make is nnx.Linear:
        in_features, out_features = layer.make.args
        weights = in_features * out_features
        return LayerCount(layer.path, "linear", (out_features,), weights + out_features, weights)
    size = tuple(-(-pixels // layer.reduction) for pixels in image_size)
    if issubclass(make, nnx.BatchNorm):
        (channels,) = layer.make.args
        return LayerCount(layer.path, "batch_norm", (*size, channels), 2 * channels, 0)
    output_size = tuple(-(-pixels // given["strides"]) for pixels in size)
    options = {"output_size": output_size, "use_bias": given["use_bias"]}
    options |= {"feature_group_count": given.get("feature_group_count", 1)}
    if make in DENSE:
        kind, cost = "subkernel", subkernel_cost(*layer.make.args, **options)
    else:
        options |= {"rank": given.get("rank", 1), "norm": given.get("norm", False)}
        kind = "subspace" if make is SubspaceChannelSelectionConv else "chansel"
        options |= {"share": given.get("share", SHARE)} if kind == "subspace" else {}
        cost = chansel_cost(*layer.make.args, input_size=size, **options)
    return LayerCount(layer.path, kind, (*output_size, layer.make.args[1]), *cost)
