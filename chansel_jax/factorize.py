"""From a trained dense network to channel selection, with a rank for each layer.

`chansel_jax.decomposition` says how a kernel is cut. What the cut has changed in the statistics of
BatchNorm, `recalibrate` estimates anew.
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chansel_jax.conv import ChannelSelectionConv, SubspaceChannelSelectionConv, unwrapped
from chansel_jax.decomposition import component_energies, factorize_kernel
from chansel_jax.functional import Tree, network_tree
from chansel_jax.networks.resnet import DENSE, ResNet, ResNetConfig
from chansel_jax.ops.window import positive, share_of_all
from chansel_jax.surgery import (
    SAME,
    DenseConv,
    Where,
    dense_convs,
    exchanged_layers,
    max_rank,
    parameter_count,
    replace_convs,
)

__all__ = [
    "component_energies",
    "factorizable",
    "factorize",
    "factorize_kernel",
    "highest_rank",
    "merge_subspaces",
    "recalibrate",
    "take_factors",
]


def factorize(
    module: nnx.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    parameter_budget: int | None = None,
    where: Where | None = None,
) -> nnx.Module:
    """A copy of `module` in which channel selection approximates its dense convolutions.

    Every convolution that `chansel_jax.surgery.replace_convs` replaces gets a rank of its own, but
    for those whose factors would hold as many parameters as their kernel or more: these stay dense,
    which is exact. The plain stem of a `ResNet` stays too, and its `config` becomes that of the new
    network, from which it can be built again. All other parameters, the batch statistics and the
    modes stay as they are. Exactly one of the first three decides the ranks:

    Args:
        module: any NNX module; it is not changed.
        rank: of every convolution, or the highest it can have, whichever is less.
        energy: each convolution's least rank that keeps this share of its energy, in (0, 1].
        parameter_budget: the most parameters of the whole module; ranks grow from 1, one at a
            time, where the share of a convolution's energy gained for a parameter is the largest.
        where: as of `replace_convs`: chooses among the convolutions. By default all are.

    Raises:
        ValueError: if not exactly one of the three is given, or it cannot be had, `module` has no
            convolution that could be factorised, one is not as `replace_convs` takes it, or one is
            in a `ResNet` whose `config` builds channel selection from a subspace or with BatchNorm
            between its parts: no `config` builds that beside the plain one.
    """
    given = {"rank": rank, "energy": energy, "parameter_budget": parameter_budget}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f"exactly one of rank, energy and parameter_budget is needed, not {given}")
    layers = factorizable(module, where)
    _check_describable(module, layers)
    if rank is not None:
        rank = positive("rank", rank)
        ranks = {path: min(rank, max_rank(layer)) for path, layer in layers.items()}
    elif energy is not None:
        # Rounding may leave the sum of all below 1.
        wanted = share_of_all("energy", energy) * (1 - 1e-12)
        ranks = {
            path: min(int((np.cumsum(shares) < wanted).sum()) + 1, len(shares))
            for path, shares in _energies(layers).items()
        }
    else:
        ranks = _ranks_within(parameter_budget, layers, parameter_count(module))
    smaller = {path: rank for path, rank in ranks.items() if rank <= highest_rank(layers[path])}
    factored, _ = replace_convs(module, rank=smaller, where=lambda path, _: path in smaller)
    for _, part in nnx.iter_graph(factored, graph=True):
        if isinstance(part, ResNet) and _has_channel_selection(part):
            part.config = _described(part)
    return factored


def factorizable(module: nnx.Module, where: Where | None = None) -> dict[str, DenseConv]:
    """The convolutions of `module`, by path, that `factorize` chooses a rank for.

    Raises:
        ValueError: if there are none, or one cannot be replaced.
    """
    parts = [part for _, part in nnx.iter_graph(module, graph=True) if isinstance(part, ResNet)]
    stems = {id(part.stem.conv) for part in parts if part.config.stem == "plain"}
    convs = dense_convs(module, where)
    found = {path: layer for path, layer in convs.items() if id(layer) not in stems}
    if not found:
        raise ValueError(f"module of type {type(module).__name__} has no convolution to factorise")
    return found


def highest_rank(layer: DenseConv) -> int:
    """The highest rank at which its factors hold fewer parameters than its kernel; 0 if none do."""
    kernel, factors = _sizes(layer)
    return (kernel - 1) // factors


def take_factors(network: nnx.Module, dense: nnx.Module) -> None:
    """Gives `network`, in place, the parameters and batch statistics of a dense network.

    Each channel selection of `network` has the leading singular vectors of the kernel in its place,
    as many as its rank is. With a `dense` that is trained it begins with what that one has learned,
    with one that is only initialised as Khodak et al., "Initialization and Regularization of
    Factorized Neural Layers" (2021), begin: their spectral initialisation.

    Args:
        network: with channel selection, without BatchNorm between the parts.
        dense: the same but for dense convolutions in the place of channel selection.

    Raises:
        ValueError: naming the first array that is not of the same shape in both.
    """
    own, others = network_tree(network), network_tree(dense)
    new = {kind: _factored(own[kind], tree, kind) for kind, tree in others.items()}
    nnx.update(network, *new.values())


def _factored(own: Tree, dense: Tree, path: str) -> Tree:
    """`dense`, a tree like `own`, but for kernels where `own` has the parts of a selection."""
    if not isinstance(dense, Mapping):
        if jnp.shape(own) != dense.shape:
            shapes = f"{jnp.shape(own)} in network and {dense.shape} in dense"
            raise ValueError(f"{path} is of shape {shapes}")
        return dense
    if "kernel" in dense and "depthwise" in own:
        kernel = np.asarray(dense["kernel"])
        *sizes, rank, outputs = own["depthwise"].shape
        shape = (*sizes, own["pointwise"].shape[0], outputs)
        if shape != kernel.shape:
            raise ValueError(f"{path} is of {shape} in network and of {kernel.shape} in dense")
        parts = factorize_kernel(kernel, rank)
        cut = dict(zip(("pointwise", "depthwise"), parts, strict=True))
        cut = {name: jax.device_put(part.astype(kernel.dtype)) for name, part in cut.items()}
        dense = {name: leaf for name, leaf in dense.items() if name != "kernel"} | cut
    if lonely := own.keys() ^ dense.keys():
        holder = "network" if min(lonely, key=str) in own else "dense"
        name = f"{path}.{min(map(str, lonely))}"
        raise ValueError(f"{name} is in {holder} only: the two differ in structure")
    return {name: _factored(own[name], leaf, f"{path}.{name}") for name, leaf in dense.items()}


def merge_subspaces(module: nnx.Module) -> nnx.Module:
    """A copy of `module` in which channel selection needs no subspace, and computes the same.

    The two matrices of every `SubspaceChannelSelectionConv` are multiplied to the one `pointwise`
    of a `ChannelSelectionConv`. A subspace of all channels is so made smaller, and a network may
    have it in training alone; one of a fourth of them becomes larger. The `config` of a `ResNet`
    follows.

    Args:
        module: any NNX module; it is not changed.

    Raises:
        ValueError: naming the path of a layer with BatchNorm between its parts, or if there is no
            layer with a subspace.
    """
    copy, new = nnx.clone(module, graph=True), {}
    for path, layer in nnx.iter_graph(copy, graph=True):
        if isinstance(layer, SubspaceChannelSelectionConv):
            try:
                new[id(layer)] = _merged(layer)
            except ValueError as error:
                raise ValueError(f"{'.'.join(map(str, path)) or 'module'}: {error}") from error
        if isinstance(layer, ResNet) and _has_subspaces(layer.config):
            given = dict(getattr(layer.config.conv, "keywords", {}))
            given.pop("share", None)
            conv = functools.partial(ChannelSelectionConv, **given)
            layer.config = dataclasses.replace(layer.config, conv=conv)
    if not new:
        raise ValueError(f"module of type {type(module).__name__} has no layer with a subspace")
    return exchanged_layers(copy, new)


def _has_subspaces(config: ResNetConfig) -> bool:
    return unwrapped(config.conv) is SubspaceChannelSelectionConv


def _merged(layer: SubspaceChannelSelectionConv) -> ChannelSelectionConv:
    product, depthwise = layer.merged_pointwise(), layer.depthwise[...]
    new = ChannelSelectionConv(
        layer.in_features,
        layer.out_features,
        layer.kernel_size[0] if layer.kernel_size_is_integer else layer.kernel_size,
        **{name: getattr(layer, name) for name in SAME},
        use_bias=False,
        rank=layer.rank,
        lowering=layer.lowering,
        pointwise_init=lambda *_: product,
        depthwise_init=lambda *_: depthwise,
        rngs=nnx.Rngs(0),
    )
    new.use_bias, new.bias = layer.use_bias, nnx.data(layer.bias)
    for name in ("pointwise", "depthwise"):  # what was frozen, sharded or marked otherwise stays so
        part, made = getattr(layer, name), getattr(new, name)
        setattr(new, name, type(part)(made[...], **part.get_metadata()))
    return new


def recalibrate(module: nnx.Module, batches: Iterable[Any]) -> nnx.Module:
    """A copy of `module` whose BatchNorm layers have the statistics of `batches`.

    Their running means and variances become the averages, over the batches, of each batch's mean
    and variance, whatever the layers' momentum is; with fewer images in some batch, that one counts
    as much as the others. While they are estimated BatchNorm normalises by the batch, as it does in
    training, and everything else is in the mode of evaluation. Parameters and modes are those of
    `module`, which is not changed. A BatchNorm that is called several times for a batch has the
    statistics of the last time, and one that is not called, or only with its running statistics,
    keeps its own.

    Args:
        module: any NNX module; without BatchNorm the copy is as it was.
        batches: what the module is called with: an array for each batch, or a tuple of its
            arguments.

    Raises:
        ValueError: if there is no batch, or `batches` is one array.
    """
    if hasattr(batches, "ndim"):
        raise ValueError(f"batches is one array of shape {batches.shape}: write [images]")
    graph, statistics, rest = nnx.split(_estimating(module), nnx.BatchStat, ..., graph=True)

    @jax.jit
    def of_batch(statistics, rest, inputs):
        # Flax computes with several dtypes, which JAX may have been told to refuse.
        with jax.numpy_dtype_promotion("standard"):
            worker = nnx.merge(graph, statistics, rest)
            before = [norm.mean.get_value() for norm in _batch_norms(worker)]
            worker(*inputs)
        return [
            None if norm.mean.get_value() is own else (norm.mean[...], norm.var[...])
            for norm, own in zip(_batch_norms(worker), before, strict=True)
        ]

    total, count = 0.0, 0
    for count, batch in enumerate(batches, start=1):  # noqa: B007
        inputs = batch if isinstance(batch, tuple) else (batch,)
        found = jax.device_get(of_batch(statistics, rest, inputs))
        found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), found)
        total = found if count == 1 else jax.tree.map(np.add, total, found)
    if not count:
        raise ValueError("batches holds no batch to take the statistics of")
    copy = nnx.clone(module, graph=True)
    for norm, sums in zip(_batch_norms(copy), total, strict=True):
        for variable, value in zip((norm.mean, norm.var), sums or (), strict=bool(sums)):
            variable[...] = jnp.asarray(value / count, variable.dtype)
    return copy


def _batch_norms(module: nnx.Module) -> list[nnx.BatchNorm]:
    layers = nnx.iter_graph(module, graph=True)
    return [layer for _, layer in layers if isinstance(layer, nnx.BatchNorm)]


def _estimating(module: nnx.Module) -> nnx.Module:
    """A copy whose BatchNorm layers keep nothing but the statistics of the last batch."""
    copy = nnx.clone(module, graph=True)
    copy.eval()
    for norm in _batch_norms(copy):
        norm.use_running_average, norm.momentum = False, 0.0
        # What is not finite would stay, multiplied by a momentum of zero.
        for variable in (norm.mean, norm.var):
            variable[...] = jnp.nan_to_num(variable[...], posinf=0.0, neginf=0.0)
    return copy


def _energies(layers: Mapping[str, DenseConv]) -> dict[str, np.ndarray]:
    return {p: component_energies(np.asarray(layer.kernel[...])) for p, layer in layers.items()}


def _sizes(layer: DenseConv) -> tuple[int, int]:
    """The parameters of its kernel, and of the factors of one rank."""
    channels, elements = (
        layer.in_features // layer.feature_group_count,
        math.prod(layer.kernel_size),
    )
    return channels * elements * layer.out_features, (channels + elements) * layer.out_features


def _ranks_within(budget: int, layers: Mapping[str, DenseConv], dense: int) -> dict[str, int]:
    """Ranks from 1 on, raised where it gains the most for a parameter, until none fits.

    Above its highest rank a layer is dense, at all of its energy. `dense` is what the whole module
    holds with every layer dense.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | np.integer):
        raise ValueError(f"parameter_budget={budget!r} must be an integer")
    sizes = {path: _sizes(layer) for path, layer in layers.items()}
    highest = {path: highest_rank(layer) for path, layer in layers.items()}
    kept = {path: np.cumsum(shares) for path, shares in _energies(layers).items()}
    ranks = dict.fromkeys(layers, 1)
    spent = dense - sum(max(0, kernel - factors) for kernel, factors in sizes.values())
    if spent > budget:
        raise ValueError(f"parameter_budget={budget} must be at least the {spent} of rank 1")

    def next_step(path):
        """What the next rank gains for a parameter, as a heap sorts it, and what it costs."""
        kernel, factors = sizes[path]
        rank = ranks[path]
        last = rank == highest[path]
        gain = (1.0 if last else kept[path][rank]) - kept[path][rank - 1]
        cost = kernel - rank * factors if last else factors
        return -gain / cost, path, cost

    steps = [next_step(path) for path in layers if highest[path]]
    heapq.heapify(steps)
    while steps:
        _, path, cost = heapq.heappop(steps)
        if spent + cost > budget:
            continue
        spent, ranks[path] = spent + cost, ranks[path] + 1
        if ranks[path] <= highest[path]:
            heapq.heappush(steps, next_step(path))
    return ranks


def _check_describable(module: nnx.Module, layers: Mapping[str, DenseConv]) -> None:
    chosen = {*map(id, layers.values())}
    for path, part in nnx.iter_graph(module, graph=True):
        if not isinstance(part, ResNet):
            continue
        conv = part.config.conv
        other = _has_subspaces(part.config) or getattr(conv, "keywords", {}).get("norm")
        if other and any(id(layer) in chosen for _, layer in nnx.iter_graph(part, graph=True)):
            name = ".".join(map(str, path)) or "module"
            raise ValueError(f"{name}: no config builds plain channel selection beside conv={conv}")


def _has_channel_selection(network: ResNet) -> bool:
    return any(isinstance(part, ChannelSelectionConv) for _, part in nnx.iter_modules(network))


def _described(network: ResNet) -> ResNetConfig:
    """The config that builds the layers which `network` has."""
    config = network.config
    if unwrapped(config.conv) in DENSE:  # whose shortcuts have stayed
        conv = _channel_selection_like(config.conv)
        config = dataclasses.replace(config, conv=conv, replaced="spatial")
    elif isinstance(network.stem.conv, ChannelSelectionConv) and not config.replaces_stem:
        config = dataclasses.replace(config, replaced="spatial", rank=1)
    parts = {".".join(map(str, path)): part for path, part in nnx.iter_modules(network)}
    spatial = [
        parts[layer.path]
        for layer in config.layers()
        if isinstance(parts[layer.path], DenseConv | ChannelSelectionConv)
        and math.prod(parts[layer.path].kernel_size) > 1
        and (layer.path != "stem.conv" or config.replaces_stem)
    ]
    return dataclasses.replace(config, rank=tuple(getattr(layer, "rank", 0) for layer in spatial))


def _channel_selection_like(conv: Any) -> Any:
    """`ChannelSelectionConv` with those arguments of a dense `conv` that surgery keeps."""
    given = getattr(conv, "keywords", {})
    kept = {name: given[name] for name in ("precision", "param_dtype", "lowering") if name in given}
    if kept.get("lowering") == "lax":
        kept["lowering"] = "composed"
    return functools.partial(ChannelSelectionConv, **kept) if kept else ChannelSelectionConv
