"""Any network's dense convolutions, replaced by channel selection.

A network is any NNX module, however its layers are nested. What is replaced are the layers
`nnx.Conv` and `SubKernelConv`; everything else stays as it is.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from chansel_jax.conv import (
    SHARE,
    ChannelSelectionConv,
    SubKernelConv,
    SubspaceChannelSelectionConv,
    subspace_size,
    unwrapped,
)
from chansel_jax.decomposition import component_energies, factorize_kernel
from chansel_jax.ops.window import positive
from chansel_jax.tables import aligned

DenseConv = nnx.Conv | SubKernelConv
Where = Callable[[str, DenseConv], bool]

SAME = (
    *("strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count"),
    *("dtype", "param_dtype", "precision", "promote_dtype", "preferred_element_type"),
)
_OWN = ("norm", "lowering", "kernel_init", "pointwise_init", "depthwise_init")


@dataclasses.dataclass(frozen=True)
class Replacement:
    """A layer that was replaced.

    Attributes:
        path: of the layer, as in `"blocks.0.conv1"`; `""` if it is the whole module.
        parameters_before: of the dense convolution, its bias among them.
        parameters_after: of the channel selection, likewise.
        rank: of the channel selection.
        energy: the share of the dense kernel's energy (its squared norm) that the channel selection
            keeps, from 0 to 1; None if it was initialised anew.
    """

    path: str
    parameters_before: int
    parameters_after: int
    rank: int
    energy: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What `replace_convs` has done; `str` makes a table of it.

    Attributes:
        rows: one for each layer that was replaced, in the order of their paths in the module.
        parameters_before: of the whole module; those that layers share count once.
        parameters_after: likewise.
    """

    rows: tuple[Replacement, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        lines = [("layer", "dense", "channel selection", "rank", "energy kept")]
        for row in self.rows:
            energy = "" if row.energy is None else f"{row.energy:.1%}"
            sizes = _with_commas(row.parameters_before, row.parameters_after)
            lines.append((row.path or "(itself)", *sizes, str(row.rank), energy))
        before = sum(row.parameters_before for row in self.rows)
        after = sum(row.parameters_after for row in self.rows)
        lines.append(("these layers", *_with_commas(before, after), "", ""))
        whole = _with_commas(self.parameters_before, self.parameters_after)
        lines.append(("all parameters", *whole, "", ""))
        return "\n".join(aligned(lines, left=1))


def replace_convs(
    module: nnx.Module,
    *,
    rank: int | Mapping[str, int] = 1,
    conv: Callable[..., ChannelSelectionConv] = ChannelSelectionConv,
    where: Where | None = None,
    from_weights: bool = True,
    rngs: nnx.Rngs | None = None,
) -> tuple[nnx.Module, Report]:
    """A copy of `module` in which channel selection takes the place of dense convolutions.

    Every `nnx.Conv` and `SubKernelConv` is replaced but the 1 × 1 and the depthwise ones, which
    have several groups, each of one input channel. An ordinary convolution of one input channel is
    replaced, though its channel selection is the larger: `where` may leave it out. What stays too
    are subclasses of the two that define `__call__` themselves. The new layer has the same
    channels, kernel size, window, groups, dtypes and metadata, and keeps the bias as it is; of
    `SubKernelConv` it has the lowering, unless `conv` brings one (`"lax"` becomes `"composed"`, or
    `"grouped"` with `norm`, which are of `lax` too). A layer that several modules share is replaced
    once and stays shared. A `ResNet` keeps its `config`, which says what it was built from;
    `chansel_jax.factorize` brings it along.

    Args:
        module: of layers in attributes, `nnx.List`, `nnx.Dict`, `nnx.Sequential` or containers of
            Python, or a convolution itself; it is not changed.
        rank: of every channel selection, or the highest the layer can have, min(C_in/G, K), if that
            is less. Default 1. A mapping has a rank for each path; layers that it does not name
            stay.
        conv: what takes the place of a dense convolution: `ChannelSelectionConv` (the default),
            `SubspaceChannelSelectionConv`, or a `functools.partial` of one with some of `norm`,
            `share`, `lowering`, `kernel_init`, `pointwise_init` and `depthwise_init`. A subspace,
            normalisation and initialisers need `from_weights=False`; BatchNorm begins in the mode
            of training.
        where: is called with the path of a layer (as in `"blocks.0.conv1"`; a shared layer has the
            first one) and with the layer; those for which it returns False stay. By default none
            does.
        from_weights: whether the new layers approximate the kernels as well as their rank allows
            (see `chansel_jax.decomposition`), or are initialised as `conv` is. Default True.
        rngs: the stream `params` initialises the new layers; only needed without `from_weights`.

    Returns:
        The copy, and what was replaced in it.

    Raises:
        ValueError: if a rank is not an integer of at least 1 or is that of a path where nothing can
            be replaced, `conv` is another layer or brings another argument, `rngs` is missing, or a
            layer that is to be replaced has a mask or a `conv_general_dilated` of its own, is
            stacked by `nnx.vmap` or `nnx.scan`, shares its kernel with another module, is
            normalised by `nnx.WeightNorm` or `nnx.SpectralNorm`, has an argument that channel
            selection does not, or has weights that are no finite real numbers. The layer is named
            by its path.
    """
    if not from_weights and rngs is None:
        raise ValueError("rngs=None must be given with from_weights=False, to initialise layers")
    if not isinstance(module, nnx.Module):
        raise ValueError(f"module of type {type(module).__name__} must be an nnx.Module")
    _check_conv(conv, from_weights)
    chosen = dense_convs(module, where)
    ranks = _ranks(rank, chosen, _share(conv))
    copy = nnx.clone(module, graph=True)
    copied = {path: layer for path, layer in _layers(copy) if path in ranks}
    new, rows = {}, []
    for path, layer in copied.items():
        try:
            new[id(layer)], row = _replaced(
                path, layer, conv, ranks[path], None if from_weights else rngs
            )
        except ValueError as error:
            raise ValueError(f"{path or 'module'}: {error}") from error
        rows.append(row)
    result = exchanged_layers(copy, new)
    return result, Report(tuple(rows), parameter_count(module), parameter_count(result))


def dense_convs(module: nnx.Module, where: Where | None = None) -> dict[str, DenseConv]:
    """The layers of `module`, by path, that `replace_convs` replaces.

    Raises:
        ValueError: naming the path of a layer that is to be replaced and cannot be, or `where`, if
            it is no function.
    """
    if where is not None and not callable(where):
        raise ValueError(f"where={where!r} must be a function of a path and a layer")
    found, holders = {}, _holders(module)
    normalised = {
        id(part): type(node).__name__
        for _, node in nnx.iter_graph(module, graph=True)
        if isinstance(node, nnx.WeightNorm | nnx.SpectralNorm)
        for _, part in nnx.iter_graph(node.layer_instance, graph=True)
    }
    for path, layer in _layers(module):
        if where is not None and not where(path, layer):
            continue
        _check_replaceable(path or "module", layer)
        if id(layer) in normalised:
            kind = normalised[id(layer)]
            raise ValueError(f"{path} has a kernel that nnx.{kind} changes when it is called")
        if others := set(holders[id(layer.kernel)]) - {path}:
            both = f"{path or 'module'} shares its kernel with {min(others) or 'the whole module'}"
            raise ValueError(f"{both}: no factors are shared so")
        found[path] = layer
    return found


def _check_conv(conv: Any, from_weights: bool) -> None:
    """Raises `ValueError` if `conv` cannot take the place of a dense convolution."""
    kind, given = unwrapped(conv), getattr(conv, "keywords", {})
    if not (isinstance(kind, type) and issubclass(kind, ChannelSelectionConv)):
        raise ValueError(
            f"conv={conv!r} must be ChannelSelectionConv, SubspaceChannelSelectionConv or a "
            "functools.partial of one"
        )
    own = (*_OWN, "share") if issubclass(kind, SubspaceChannelSelectionConv) else _OWN
    if others := [*map(repr, getattr(conv, "args", ())), *sorted(given.keys() - set(own))]:
        raise ValueError(
            f"conv brings {', '.join(others)}; what it may bring is {', '.join(own)}, and the "
            "dense layer or another argument decides the rest"
        )
    if not from_weights:
        return
    if kind is not ChannelSelectionConv:
        raise ValueError(
            f"conv={kind.__name__} can only be initialised anew: give from_weights=False"
        )
    if useless := sorted(name for name in given.keys() - {"lowering"} if given[name]):
        raise ValueError(
            f"conv brings {', '.join(useless)}, which only layers that are initialised have: give "
            "from_weights=False"
        )


def _share(conv: Any) -> float:
    """The share of a group's channels that `conv` selects from."""
    of_subspace = issubclass(unwrapped(conv), SubspaceChannelSelectionConv)
    return getattr(conv, "keywords", {}).get("share", SHARE) if of_subspace else 1.0


def _holders(module: nnx.Module) -> dict[int, list[str]]:
    """The paths of the modules that hold each variable, by its id."""
    found = collections.defaultdict(list)
    for path, node in nnx.iter_graph(module, graph=True):
        if isinstance(node, nnx.Pytree):
            name = ".".join(map(str, path))
            for leaf in jax.tree.leaves(vars(node), is_leaf=_is_node):
                if isinstance(leaf, nnx.Variable):
                    found[id(leaf)].append(name)
    return found


def _is_node(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def parameter_count(module: nnx.Module) -> int:
    """The number of elements of all `nnx.Param` of `module`; those that are shared count once."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param, graph=True)))


def _layers(module: nnx.Module) -> list[tuple[str, DenseConv]]:
    """The dense convolutions with a spatial kernel and channels to sum, by path, each once."""
    return [
        (".".join(map(str, path)), layer)
        for path, layer in nnx.iter_graph(module, graph=True)
        if _is_dense_conv(layer)
        and math.prod(layer.kernel_size) > 1
        and not 1 < layer.feature_group_count == layer.in_features
    ]


def _is_dense_conv(layer: Any) -> bool:
    """Whether it computes as one of the two does, not in a way of its own."""
    kinds = nnx.Conv, SubKernelConv
    return any(isinstance(layer, k) and type(layer).__call__ is k.__call__ for k in kinds)


def _check_replaceable(path: str, layer: DenseConv) -> None:
    if layer.mask is not None:
        raise ValueError(f"{path} has a mask, and channel selection has no dense kernel to mask")
    if layer.conv_general_dilated is not lax.conv_general_dilated:
        raise ValueError(f"{path} has a conv_general_dilated of its own, and is not replaced")
    shape, axes = layer.kernel.shape, len(layer.kernel_size) + 2
    if len(shape) != axes:
        raise ValueError(
            f"{path} is stacked, as by nnx.vmap or nnx.scan: its kernel of shape {shape} has more "
            f"than the {axes} axes of one layer's; replace before stacking"
        )


def _ranks(
    rank: int | Mapping[str, int], chosen: Mapping[str, DenseConv], share: float
) -> dict[str, int]:
    """The rank of each layer that is to be replaced."""
    if not isinstance(rank, Mapping):
        given = dict.fromkeys(chosen, positive("rank", rank))
    else:
        given = {path: positive(f"rank[{path!r}]", value) for path, value in rank.items()}
    for path in given:
        if path not in chosen:
            there = ", ".join(map(repr, chosen)) or "none"
            raise ValueError(f"rank[{path!r}] is of no layer that is replaced; these are: {there}")
    return {path: min(value, max_rank(chosen[path], share)) for path, value in given.items()}


def max_rank(layer: DenseConv, share: float = 1.0) -> int:
    """min(C_in/G, K), at which channel selection is exact; from a subspace min(M, K)."""
    channels = subspace_size(layer.in_features // layer.feature_group_count, share)
    return min(channels, math.prod(layer.kernel_size))


def _replaced(
    path: str,
    layer: DenseConv,
    conv: Callable[..., ChannelSelectionConv],
    rank: int,
    rngs: nnx.Rngs | None,
) -> tuple[ChannelSelectionConv, Replacement]:
    """What takes the place of `layer`: from its weights, or initialised by `rngs`."""
    parts, energy = ({}, None) if rngs else _factors(layer, rank)
    new = conv(
        layer.in_features,
        layer.out_features,
        layer.kernel_size[0] if _of_an_integer(layer) else layer.kernel_size,
        **{name: getattr(layer, name) for name in SAME},
        use_bias=False,
        rank=rank,
        kernel_metadata=layer.kernel.get_metadata(),
        **_lowering(layer, getattr(conv, "keywords", {})),
        **parts,
        rngs=rngs or nnx.Rngs(0),
    )
    new.use_bias, new.bias = layer.use_bias, nnx.data(layer.bias)
    kind = type(layer.kernel)
    for name in {"subspace", "pointwise", "depthwise"} & vars(new).keys():
        part = getattr(new, name)
        if type(part) is not kind:  # a kernel that was frozen, or marked otherwise, stays so
            setattr(new, name, kind(part[...], **part.get_metadata()))
    learnt = nnx.Not(nnx.BatchStat)
    states = (nnx.state(each, learnt) for each in (layer, new))
    sizes = (sum(leaf.size for leaf in jax.tree.leaves(state)) for state in states)
    return new, Replacement(path, *sizes, rank, energy)


def _factors(layer: DenseConv, rank: int) -> tuple[dict[str, nnx.Initializer], float]:
    """What initialises both parts by the kernel's factors, and the energy that they keep."""
    if isinstance(layer.kernel.get_value(), jax.ShapeDtypeStruct):
        raise ValueError("its kernel has a shape and no values, as nnx.eval_shape makes it")
    if isinstance(layer.kernel.get_value(), jax.core.Tracer):
        raise ValueError("its kernel has no values while JAX traces: replace outside of jax.jit")
    if not jnp.issubdtype(layer.kernel.dtype, jnp.floating):
        raise ValueError(f"its kernel is of {layer.kernel.dtype}, factors are real numbers")
    kernel = np.asarray(layer.kernel[...])
    energy = min(1.0, float(component_energies(kernel)[:rank].sum()))
    factors = factorize_kernel(kernel, rank)
    # Not by jnp.asarray, which compiles a program for every shape.
    pointwise, depthwise = jax.device_put([factor.astype(kernel.dtype) for factor in factors])
    inits = {"pointwise_init": lambda *_: pointwise, "depthwise_init": lambda *_: depthwise}
    return inits, energy


def _of_an_integer(layer: DenseConv) -> bool:
    """Whether it refuses several batch axes; `nnx.Conv` takes them whatever its kernel's size."""
    return getattr(layer, "kernel_size_is_integer", False)


def _lowering(layer: DenseConv, given: Mapping[str, Any]) -> dict[str, str]:
    """The lowering that the new layer has of `layer`, unless it was `given` another."""
    lowering = getattr(layer, "lowering", "auto")  # nnx.Conv has none
    if "lowering" in given:
        return {}
    if lowering == "lax":
        lowering = "grouped" if given.get("norm") else "composed"
    return {"lowering": lowering}


def exchanged_layers(root: Any, new: Mapping[int, ChannelSelectionConv]) -> Any:
    """`root` with the layers of these ids exchanged, wherever a module refers to them."""

    def exchanged(value: Any) -> Any:
        return jax.tree.map(lambda leaf: new.get(id(leaf), leaf), value, is_leaf=_is_node)

    for _, node in list(nnx.iter_graph(root, graph=True)):
        if not isinstance(node, nnx.Pytree) or id(node) in new:
            continue
        for name, value in list(vars(node).items()):
            if any(id(leaf) in new for leaf in jax.tree.leaves(value, is_leaf=_is_node)):
                setattr(node, name, nnx.data(exchanged(value)))
    return exchanged(root)


def _with_commas(*numbers: int) -> list[str]:
    return [f"{number:,}" for number in numbers]
