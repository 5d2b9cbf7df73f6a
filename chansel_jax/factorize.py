"""From a trained dense network to channel selection, by singular values.

The kernel of one output channel, as a matrix `(C_in, K_h·K_w)`, is a sum of outer products: of its
singular vectors, weighted with its singular values. Each is a channel selection. The R leading ones
are the best sum of R in the Frobenius norm (Eckart and Young, 1936), and all of them,
R = min(C_in, K_h·K_w), are the kernel itself. Guo et al., "Network Decoupling" (2018), decompose
trained networks so; Haase and Amthor (CVPR 2020) report how much the first component holds.

The energy of a component is its squared singular value.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from chansel_jax.conv import ChannelSelectionConv, SubKernelConv
from chansel_jax.counting import count_network
from chansel_jax.functional import network_tree
from chansel_jax.networks.resnet import ResNet, ResNetConfig, unwrapped
from chansel_jax.ops.window import positive


def factorize(
    network: ResNet,
    *,
    rank: int | None = None,
    energy: float | None = None,
    parameter_budget: int | None = None,
) -> ResNet:
    """A network of channel selection that approximates the dense `network`.

    Every 3 × 3 convolution (and a pooled stem's 7 × 7 one) gets a rank of its own; 1 × 1 shortcuts
    are exact at rank 1; a plain stem stays. All other parameters and the batch statistics are
    copied; the precision and the mode, of training or of evaluation, stay, and so does the lowering
    (`"lax"` becomes `"composed"`, which is of `lax` too). Exactly one of these decides the ranks:

    Args:
        network: of `SubKernelConv`; it is not changed.
        rank: of every convolution, or the highest it can have, whichever is less.
        energy: each convolution's least rank that keeps this share of its energy, in (0, 1].
        parameter_budget: the most parameters of the whole network; ranks grow from 1, one at a
            time, where the share of a convolution's energy gained for a parameter is the largest.

    Raises:
        ValueError: if `network` is of another convolution, not exactly one of the three is given,
            or it cannot be had.
    """
    given = {"rank": rank, "energy": energy, "parameter_budget": parameter_budget}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"exactly one of rank, energy and parameter_budget is needed, not {given}")
    if unwrapped(network.config.conv) is not SubKernelConv:
        raise ValueError(f"network of {network.config.conv} must be of SubKernelConv")
    layers = [layer for _, layer in dense_layers(network)]
    if rank is not None:
        ranks = [min(positive("rank", rank), max_rank(layer)) for layer in layers]
    elif energy is not None:
        if not 0 < energy <= 1:
            raise ValueError(f"energy={energy} must be in (0, 1]")
        energies = [component_energies(np.asarray(layer.kernel[...])) for layer in layers]
        wanted = energy * (1 - 1e-12)  # rounding may leave the sum of all below 1
        ranks = [min(int((np.cumsum(e) < wanted).sum()) + 1, len(e)) for e in energies]
    else:
        ranks = _ranks_within(network, layers, parameter_budget)
    factored = ResNet(_config(network, ranks), rngs=nnx.Rngs(0))
    tree = network_tree(network)
    params = _carried(tree["params"], network_tree(factored)["params"])
    nnx.update(factored, params, tree["batch_stats"])
    _copy_modes(network, factored)
    return factored


def factorize_kernel(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Both parts of the best channel selection of `rank` for a dense kernel, in float64.

    Args:
        kernel: `(K_h, K_w, C_in, C_out)`.
        rank: R, from 1 to min(C_in, K_h·K_w).

    Returns:
        The pointwise kernel `(C_in, C_out·R)` and the depthwise one `(K_h, K_w, R, C_out)`; each
        has the square root of a component's singular value.

    Raises:
        ValueError: if `rank` is out of range.
    """
    rows, columns, in_channels, out_channels = kernel.shape
    most = min(in_channels, rows * columns)
    if not 1 <= rank <= most:
        raise ValueError(f"rank={rank} must be from 1 to min(C_in, K_h·K_w) = {most}")
    left, values, right = np.linalg.svd(_matrices(kernel), full_matrices=False)
    roots = np.sqrt(values[:, :rank])
    # (C_out, C_in, R) and (C_out, R, K_h·K_w).
    left, right = left[:, :, :rank] * roots[:, None], right[:, :rank] * roots[:, :, None]
    pointwise = left.transpose(1, 0, 2).reshape(in_channels, out_channels * rank)
    depthwise = right.reshape(out_channels, rank, rows, columns).transpose(2, 3, 1, 0)
    return pointwise, depthwise


def component_energies(kernel: np.ndarray) -> np.ndarray:
    """The share of a dense kernel's energy in each component, the largest first.

    Args:
        kernel: `(K_h, K_w, C_in, C_out)`.

    Returns:
        `(min(C_in, K_h·K_w),)` float64: squared singular values, added up over the output channels,
        over the squared norm. A kernel of zeros has all of its energy in the first.
    """
    values = np.linalg.svd(_matrices(kernel), compute_uv=False)
    energies = (values**2).sum(axis=0)
    total = energies.sum()
    return energies / total if total > 0 else np.eye(1, len(energies))[0]


def dense_layers(network: ResNet) -> Iterator[tuple[str, SubKernelConv]]:
    """The convolutions that get a rank of their own, by path, in the order of `config.ranks`."""
    if network.config.stem == "pooled":
        yield "stem.conv", network.stem.conv
    for i, block in enumerate(network.blocks):
        yield f"blocks.{i}.conv1", block.conv1
        yield f"blocks.{i}.conv2", block.conv2


def max_rank(layer: SubKernelConv) -> int:
    """min(C_in, K_h·K_w), at which channel selection is exact."""
    return min(layer.in_features, math.prod(layer.kernel_size))


def _ranks_within(network: ResNet, layers: Sequence[SubKernelConv], budget: int) -> list[int]:
    """Ranks from 1 on, raised where it gains the most for a parameter, until none fits."""
    costs = [
        (layer.in_features + math.prod(layer.kernel_size)) * layer.out_features for layer in layers
    ]
    energies = [component_energies(np.asarray(layer.kernel[...])) for layer in layers]
    ranks = [1] * len(layers)
    spent = sum(row.parameters for row in count_network(_config(network, ranks), image_size=1))
    if spent > budget:
        raise ValueError(f"parameter_budget={budget} must be at least the {spent} of rank 1")
    gains = [
        (-energy[1] / cost, i)
        for i, (energy, cost) in enumerate(zip(energies, costs, strict=True))
        if len(energy) > 1
    ]
    heapq.heapify(gains)
    while gains:
        _, i = heapq.heappop(gains)
        if spent + costs[i] > budget:
            continue
        spent, ranks[i] = spent + costs[i], ranks[i] + 1
        if ranks[i] < len(energies[i]):
            heapq.heappush(gains, (-energies[i][ranks[i]] / costs[i], i))
    return ranks


def _config(network: ResNet, ranks: Sequence[int]) -> ResNetConfig:
    given = getattr(network.config.conv, "keywords", {})
    kept = {name: given[name] for name in ("precision", "param_dtype", "lowering") if name in given}
    if kept.get("lowering") == "lax":
        kept["lowering"] = "composed"
    conv = functools.partial(ChannelSelectionConv, **kept) if kept else ChannelSelectionConv
    return dataclasses.replace(network.config, conv=conv, rank=tuple(ranks))


def _copy_modes(network: ResNet, factored: ResNet) -> None:
    """Has the layers of `factored` train or evaluate as those of `network` do."""
    layers = dict(nnx.iter_modules(network))
    for path, layer in nnx.iter_modules(factored):
        for mode in ("deterministic", "use_running_average"):
            if hasattr(layer, mode):
                setattr(layer, mode, getattr(layers[path], mode))


def _carried(dense: dict[str, Any], factored: dict[str, Any]) -> dict[str, Any]:
    """The parameters `dense` in the structure of `factored`."""
    if "pointwise" in factored:
        kernel = dense["kernel"]
        rank = factored["depthwise"].shape[2]
        pointwise, depthwise = factorize_kernel(np.asarray(kernel), rank)
        others = {name: value for name, value in dense.items() if name != "kernel"}
        return others | {
            "pointwise": jnp.asarray(pointwise, kernel.dtype),
            "depthwise": jnp.asarray(depthwise, kernel.dtype),
        }
    return {
        name: _carried(value, factored[name]) if isinstance(value, dict) else value
        for name, value in dense.items()
    }


def _matrices(kernel: np.ndarray) -> np.ndarray:
    """`(C_out, C_in, K_h·K_w)` float64, a matrix for each output channel."""
    rows, columns, in_channels, out_channels = kernel.shape
    matrices = np.asarray(kernel, np.float64).transpose(3, 2, 0, 1)
    return matrices.reshape(out_channels, in_channels, rows * columns)
