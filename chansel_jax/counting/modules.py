"""Parameters and multiply-adds of any function that JAX traces, module by module."""

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

from chansel_jax.counting.multiply_adds import Work, multiply_adds
from chansel_jax.counting.scopes import (
    Outputs,
    Place,
    has_scope,
    module_scopes,
    number_of,
    set_place,
)
from chansel_jax.ops.lowerings import by_definition
from chansel_jax.tables import aligned


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
        rule = ["─" * max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(aligned([lines[0], rule, *lines[1:-1], rule, lines[-1]], left=3))


def _figures(counted: Row | Count) -> tuple[str, str]:
    products = f"{'≥ ' if counted.at_least else ''}{counted.multiply_adds:,}"
    return f"{counted.parameters:,}", products


def count(function: Callable, *inputs: Any, **kwargs: Any) -> Count:
    """Parameters and multiply-adds of `function(*inputs, **kwargs)`, module by module.

    The function is traced, and neither run nor compiled; no module is changed. Its multiply-adds
    are those of `chansel_jax.counting.multiply_adds`: a convolution has one for each output and
    each element of its kernel, also where that lies on padding; a `while` loop counts as if it ran
    once.

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
