"""Parameters and multiply-adds: of any function that JAX traces, and of layers in closed form.

Nothing is computed. Convolutions and matrix products have multiply-adds; adding a bias, BatchNorm,
ReLU, pooling and residual sums count nothing. Channel selection counts as the two parts it is
defined by, whichever lowering computes it. The closed forms are of one image.
"""

import collections
import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from chansel_jax.conv import SubspaceChannelSelectionConv, subspace_size
from chansel_jax.module_scopes import (
    Outputs,
    Place,
    has_scope,
    module_scopes,
    number_of,
    set_place,
)
from chansel_jax.multiply_adds import Work, multiply_adds
from chansel_jax.networks.resnet import CONVS, DENSE, Layer, ResNetConfig, unwrapped
from chansel_jax.ops.lowerings import by_definition
from chansel_jax.ops.window import Pair, per_axis


@dataclasses.dataclass(frozen=True)
class Row:
    """What one module costs without the modules in it, which have rows of their own.

    Attributes:
        path: of the module, as in `"blocks.2.shortcut"`; empty for the outermost, and for the
            function itself.
        kind: the name of the module's class, or the function's name.
        output: shape of what the module returned last, or None if it was not called or returned no
            array; in `jax.vmap` or a loop it is that of one element.
        parameters: of `nnx.Param`; what modules share, the first of them has.
        multiply_adds: of all calls.
        at_least: whether `multiply_adds` has a `while` loop in it, which counts as if it ran once.
    """

    path: str
    kind: str
    output: tuple[int, ...] | None
    parameters: int
    multiply_adds: int
    at_least: bool = False


@dataclasses.dataclass(frozen=True)
class Count:
    """What a function costs. `str()` of it is a table.

    Attributes:
        rows: the modules that have parameters or multiply-adds of their own, in the order of their
            first calls, then those that are not called; and the function, if it has multiply-adds
            outside of all modules. They add up to the whole.
    """

    rows: tuple[Row, ...]

    @property
    def parameters(self) -> int:
        """All that are learned; running statistics are not."""
        return sum(row.parameters for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        """Multiplications with an addition, for the inputs as they are, with their batch."""
        return sum(row.multiply_adds for row in self.rows)

    @property
    def at_least(self) -> bool:
        """Whether there are more multiply-adds if a `while` loop runs more than once."""
        return any(row.at_least for row in self.rows)

    def __str__(self) -> str:
        lines = [("path", "kind", "output", "parameters", "multiply-adds")]
        for row in self.rows:
            output = "" if row.output is None else " × ".join(map(str, row.output)) or "scalar"
            lines.append((row.path, row.kind, output, *_figures(row)))
        lines.append(("total", "", "", *_figures(self)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rule = ["─" * width for width in widths]
        lines = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
        aligned = [
            [f"{cell:{'<' if i < 3 else '>'}{widths[i]}}" for i, cell in enumerate(line)]
            for line in lines
        ]
        return "\n".join("  ".join(line) for line in aligned)


def _figures(counted: Row | Count) -> tuple[str, str]:
    products = f"{'≥ ' if counted.at_least else ''}{counted.multiply_adds:,}"
    return f"{counted.parameters:,}", products


def count(function: Callable, *inputs: Any, **kwargs: Any) -> Count:
    """Parameters and multiply-adds of `function(*inputs, **kwargs)`, module by module.

    The function is traced, and neither run nor compiled; no module is changed. Its multiply-adds
    are those of `chansel_jax.multiply_adds`: a convolution has one for each output and each element
    of its kernel, also where that lies on padding; a `while` loop counts as if it ran once.

    The modules among the arguments have their own rows, whatever the function does with them, as
    `nnx.value_and_grad(loss)` does. A module that the function closes over has none: its work
    counts as the function's, and its parameters do not count.

    Args:
        function: a module, a method of one, or any function of arrays, pytrees and modules.
        inputs: its arguments. Arrays, which may be `jax.ShapeDtypeStruct`, count by their shapes
            alone; whatever else is no module is handed on as it is.
        kwargs: likewise.

    Raises:
        ValueError: if `function` cannot be called.
    """
    if not callable(function):
        kind = type(function).__name__
        raise ValueError(f"function={function!r} of type {kind} must be a module or a function")
    function, inputs, kwargs, module = _unbound(function, inputs, kwargs)
    found, tree = jax.tree_util.tree_flatten_with_path((inputs, kwargs), is_leaf=_is_node)
    leaves = {i: leaf for i, (_, leaf) in enumerate(found)}
    arrays = {i: leaf for i, leaf in leaves.items() if isinstance(leaf, _ARRAYS)}
    nodes = {i: leaf for i, leaf in leaves.items() if _is_node(leaf)}
    nodes = nnx.merge(*nnx.split(nodes))  # copies, which share what the nodes share
    names = {i: jax.tree_util.keystr(found[i][0][1:], simple=True, separator=".") for i in nodes}
    whole = Place(0, "", _name(function) if module is None else type(module).__name__)
    modules = list(nnx.iter_graph(nodes))
    places = _places(modules, names, {(): whole} if module is None else {(): whole, (0,): whole})
    graph, state = nnx.split(nodes)

    def run(state: nnx.State, arrays: dict[int, jax.Array]) -> list[jax.Array]:
        given = leaves | arrays | nnx.merge(graph, state)
        inputs, kwargs = jax.tree.unflatten(tree, given.values())
        result = jax.tree.leaves(function(*inputs, **kwargs))
        return [leaf for leaf in result if isinstance(leaf, jax.Array)]

    classes = {type(node) for _, node in modules if has_scope(node)}
    with by_definition(), module_scopes(classes) as outputs:
        jaxpr, results = jax.make_jaxpr(run, return_shape=True)(state, arrays)
    if results:
        outputs[whole] = results[0].shape
    return _counted(places, outputs, _parameters(modules, places), multiply_adds(jaxpr.jaxpr))


_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)


def _is_node(value: Any) -> bool:
    return isinstance(value, nnx.Pytree | nnx.Variable)


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _unbound(
    function: Callable, inputs: tuple, kwargs: dict[str, Any]
) -> tuple[Callable, tuple, dict[str, Any], nnx.Pytree | None]:
    """The function with all its arguments, and the module that it is or is a method of."""
    if isinstance(function, functools.partial):
        given = function.args + inputs, function.keywords | kwargs
        return _unbound(function.func, *given)
    if isinstance(function, nnx.Pytree):
        return operator.call, (function, *inputs), kwargs, function
    module = getattr(function, "__self__", None)
    if isinstance(module, nnx.Pytree):
        return function.__func__, (module, *inputs), kwargs, module
    return function, inputs, kwargs, None


Path = tuple[Any, ...]  # of a node: the number of the argument's leaf, then the attributes


def _places(
    nodes: Sequence[tuple[Path, Any]], names: dict[int, str], places: dict[Path, Place]
) -> dict[Path, Place]:
    """`places` and those of all other modules, which are told theirs.

    `names` are the arguments'; a path begins with one where several have parameters.
    """
    holders = {path[0] for path, node in nodes if isinstance(node, nnx.Param)} or set(names)
    for path, node in nodes:
        if has_scope(node):
            start = [] if holders == {path[0]} else [names[path[0]]]
            name = ".".join(map(str, [*start, *path[1:]]))
            place = Place(len(places), name, type(node).__name__)
            set_place(node, places.setdefault(path, place))
    return places


def _parameters(
    nodes: Sequence[tuple[Path, Any]], places: dict[Path, Place]
) -> collections.Counter[Place]:
    """The parameters that each module has itself, not through another."""
    found = collections.Counter()
    for path, node in nodes:
        if isinstance(node, nnx.Param):
            owner = next(places[path[:n]] for n in reversed(range(len(path))) if path[:n] in places)
            found[owner] += sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(node))
    return found


def _counted(
    places: dict[Path, Place],
    outputs: Outputs,
    parameters: collections.Counter[Place],
    works: Iterable[Work],
) -> Count:
    by_number = {place.number: place for place in places.values()}
    products, at_least = collections.Counter(), set()
    for work in works:
        place = by_number[number_of(work.scopes)]
        products[place] += work.multiply_adds
        if work.at_least:
            at_least.add(place)
    rows = [
        Row(p.path, p.kind, outputs.get(p), parameters[p], products[p], p in at_least)
        for p in dict.fromkeys([*outputs, *places.values()])
    ]
    return Count(tuple(row for row in rows if row.parameters or row.multiply_adds))


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
) -> tuple[int, int]:
    """Parameters and multiply-adds of the dense convolution.

    With I, O channels, K = K_h·K_w and an output of P = H_out·W_out pixels: I·O·K parameters, O
    more for the bias, and P·I·O·K multiply-adds.

    Raises:
        ValueError: if a size is neither an integer of at least 1 nor a pair of them.
    """
    weights = in_channels * out_channels * math.prod(per_axis("kernel_size", kernel_size))
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
) -> tuple[int, int]:
    """Parameters and multiply-adds of channel selection of rank R.

    The pointwise part has I·O·R parameters and runs at the size of the input, the depthwise part
    has O·R·K and runs at the size of the output: H·W·I·O·R + H_out·W_out·O·R·K multiply-adds. A
    bias has O parameters more, normalisation between the parts 2·O·R.

    With a `share`, it is channel selection from a subspace of M = min(I, max(4, ⌈share·I⌉))
    channels: there are I·M + M·O·R in the place of I·O·R, and normalisation has 2·M more.

    Raises:
        ValueError: if a size is neither an integer of at least 1 nor a pair of them, or `share` is
            not in (0, 1].
    """
    selected = out_channels * rank
    inner = None if share is None else subspace_size(in_channels, share)
    pointwise = in_channels * selected if inner is None else inner * (in_channels + selected)
    depthwise = selected * math.prod(per_axis("kernel_size", kernel_size))
    parameters = (
        pointwise + depthwise + use_bias * out_channels + norm * 2 * (selected + (inner or 0))
    )
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
    if make is nnx.BatchNorm:
        (channels,) = layer.make.args
        return LayerCount(layer.path, "batch_norm", (*size, channels), 2 * channels, 0)
    output_size = tuple(-(-pixels // given["strides"]) for pixels in size)
    options = {"output_size": output_size, "use_bias": given["use_bias"]}
    if make in DENSE:
        kind, cost = "subkernel", subkernel_cost(*layer.make.args, **options)
    else:
        options |= {"rank": given.get("rank", 1), "norm": given.get("norm", False)}
        kind = "subspace" if make is SubspaceChannelSelectionConv else "chansel"
        options |= {"share": given.get("share", 0.25)} if kind == "subspace" else {}
        cost = chansel_cost(*layer.make.args, input_size=size, **options)
    return LayerCount(layer.path, kind, (*output_size, layer.make.args[1]), *cost)
