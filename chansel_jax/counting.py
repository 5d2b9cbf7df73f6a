"""Parameters and multiply-adds in closed form.

Nothing is initialised and nothing is run. Multiply-adds are those of one image. Convolutions and
dense layers have them; adding a bias, BatchNorm, ReLU, pooling and residual sums count nothing.
Channel selection counts as the two parts it is defined by, whichever lowering computes it.
"""

import dataclasses
import math
from collections.abc import Sequence

from flax import nnx

from chansel_jax.conv import ChannelSelectionConv, SubKernelConv
from chansel_jax.networks.resnet import MAX_POOL, PooledStem, ResNet, ResNetConfig, unwrapped
from chansel_jax.ops.window import Pair, Window, pair


@dataclasses.dataclass(frozen=True)
class LayerCount:
    """What one layer costs.

    Attributes:
        name: the layer's path in its network, as in `"blocks.2.shortcut"`.
        kind: `"subkernel"`, `"chansel"`, `"batch_norm"` or `"dense"`.
        output: shape of the output for one image: `(H, W, C)`, or `(C,)` of a dense layer.
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
) -> tuple[int, int]:
    """Parameters and multiply-adds of the dense convolution.

    With I, O channels, K = K_h·K_w and an output of P = H_out·W_out pixels: I·O·K parameters, O
    more for the bias, and P·I·O·K multiply-adds.

    Raises:
        ValueError: if a size is neither an integer of at least 1 nor a pair of them.
    """
    weights = in_channels * out_channels * math.prod(pair("kernel_size", kernel_size))
    pixels = math.prod(pair("output_size", output_size))
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
) -> tuple[int, int]:
    """Parameters and multiply-adds of channel selection of rank R.

    The pointwise part has I·O·R parameters and runs at the size of the input, the depthwise part
    has O·R·K and runs at the size of the output: H·W·I·O·R + H_out·W_out·O·R·K multiply-adds. A
    bias has O parameters more, normalisation between the parts 2·O·R.

    Raises:
        ValueError: if a size is neither an integer of at least 1 nor a pair of them.
    """
    selected = out_channels * rank
    pointwise = in_channels * selected
    depthwise = selected * math.prod(pair("kernel_size", kernel_size))
    parameters = pointwise + depthwise + use_bias * out_channels + norm * 2 * selected
    pixels_in = math.prod(pair("input_size", input_size))
    pixels_out = math.prod(pair("output_size", output_size))
    return parameters, pixels_in * pointwise + pixels_out * depthwise


def break_even(kernel_size: int | Pair) -> float:
    """The input channels above which channel selection of rank 1 has the fewer parameters.

    I·O·K > I·O + O·K exactly if I > K / (K - 1), with K = K_h·K_w; infinite for a 1 × 1 kernel.

    Raises:
        ValueError: if `kernel_size` is neither an integer of at least 1 nor a pair of them.
    """
    elements = math.prod(pair("kernel_size", kernel_size))
    return elements / (elements - 1) if elements > 1 else math.inf


def count_layer(layer: nnx.Module, input_shape: Sequence[int], *, name: str = "") -> LayerCount:
    """What `layer` costs for one image or feature vector of `input_shape`.

    Args:
        layer: a `SubKernelConv`, `ChannelSelectionConv`, `nnx.BatchNorm` or `nnx.Linear`; its
            parameters may be abstract.
        input_shape: `(H, W, C)`, or `(C,)`.
        name: of the row.

    Raises:
        ValueError: naming `layer` if it is of another type, or `input_shape` if the layer does not
            take it.
    """
    input_shape = tuple(input_shape)
    for layer_type, count in _COUNTS.items():
        if isinstance(layer, layer_type):
            return count(name, layer, input_shape)
    raise ValueError(
        f"layer={type(layer).__name__} must be one of "
        + ", ".join(layer_type.__name__ for layer_type in _COUNTS)
    )


def count_network(config: ResNetConfig, image_size: int | Pair) -> list[LayerCount]:
    """One row a layer of `ResNet(config)` for images of `image_size` (H, W), in its own order.

    A block's shortcut follows its main path. The columns of the rows add up to the network's.

    Raises:
        ValueError: if `config.conv` is neither of the two convolutions nor a `functools.partial` of
            one, or if the images are too small for the network.
    """
    _check_conv(config.conv)
    network = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    shape = (*pair("image_size", image_size), config.in_channels)
    rows = _count_chain("stem", network.stem, ("conv", "norm"), shape)
    shape = rows[-1].output
    if isinstance(network.stem, PooledStem):
        shape = _pooled(shape)
    for i, block in enumerate(network.blocks):
        path = f"blocks.{i}"
        main = _count_chain(path, block, ("conv1", "norm1", "conv2", "norm2"), shape)
        rows += main + _count_chain(path, block, ("shortcut", "shortcut_norm"), shape)
        shape = main[-1].output
    return [*rows, count_layer(network.dense, shape[-1:], name="dense")]


def _count_chain(
    path: str, module: nnx.Module, names: Sequence[str], shape: tuple[int, ...]
) -> list[LayerCount]:
    """The layers `names` of `module`, each fed by the one before; it need not have them all."""
    rows = []
    for name in names:
        layer = getattr(module, name, None)
        if layer is not None:
            rows.append(count_layer(layer, shape, name=f"{path}.{name}"))
            shape = rows[-1].output
    return rows


def _pooled(shape: tuple[int, ...]) -> tuple[int, ...]:
    window = Window.of(MAX_POOL["strides"], MAX_POOL["padding"])
    size = window.output_size(shape[:2], MAX_POOL["window_shape"])
    return *size, shape[2]


def _count_subkernel(name: str, layer: SubKernelConv, shape: tuple[int, ...]) -> LayerCount:
    size = _conv_output_size(layer, shape)
    cost = subkernel_cost(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        output_size=size,
        use_bias=layer.bias is not None,
    )
    return LayerCount(name, "subkernel", (*size, layer.out_channels), *cost)


def _count_chansel(name: str, layer: ChannelSelectionConv, shape: tuple[int, ...]) -> LayerCount:
    size = _conv_output_size(layer, shape)
    cost = chansel_cost(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        input_size=shape[:2],
        output_size=size,
        rank=layer.rank,
        use_bias=layer.bias is not None,
        norm=layer.norm is not None,
    )
    return LayerCount(name, "chansel", (*size, layer.out_channels), *cost)


def _count_batch_norm(name: str, layer: nnx.BatchNorm, shape: tuple[int, ...]) -> LayerCount:
    _check_channels(shape, layer.num_features)
    parameters = layer.num_features * (layer.use_scale + layer.use_bias)
    return LayerCount(name, "batch_norm", shape, parameters, 0)


def _count_dense(name: str, layer: nnx.Linear, shape: tuple[int, ...]) -> LayerCount:
    _check_channels(shape, layer.in_features)
    weights = layer.in_features * layer.out_features
    parameters = weights + layer.use_bias * layer.out_features
    output = (*shape[:-1], layer.out_features)
    return LayerCount(name, "dense", output, parameters, math.prod(shape[:-1]) * weights)


_COUNTS = {
    SubKernelConv: _count_subkernel,
    ChannelSelectionConv: _count_chansel,
    nnx.BatchNorm: _count_batch_norm,
    nnx.Linear: _count_dense,
}


def _conv_output_size(layer: SubKernelConv | ChannelSelectionConv, shape: tuple[int, ...]) -> Pair:
    if len(shape) != 3:
        raise ValueError(f"input_shape={shape} must be (H, W, C)")
    _check_channels(shape, layer.in_channels)
    return layer.window.output_size(shape[:2], layer.kernel_size)


def _check_channels(shape: tuple[int, ...], channels: int) -> None:
    if not shape or shape[-1] != channels:
        raise ValueError(f"input_shape={shape} must end with the layer's {channels} channels")


def _check_conv(conv: object) -> None:
    if unwrapped(conv) not in (SubKernelConv, ChannelSelectionConv):
        raise ValueError(
            f"conv={conv!r} must be SubKernelConv, ChannelSelectionConv or a functools.partial of "
            "one: of another layer no closed form is known"
        )
