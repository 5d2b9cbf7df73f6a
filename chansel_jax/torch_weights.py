"""Weights of PyTorch in and out: state dicts and `.safetensors` files.

A layer of a module has a name in a state dict, and its arrays have names behind that. The layers of
a `ResNet` have those of torchvision, which are timm's too, or those of the package `bsconv`; those
of any other module their own path, or what a mapping says. What PyTorch has too is written as it
has it, with `weight` and `bias`, and a table below says how: convolutions and transposed ones,
linear layers, embeddings, normalisations, PReLU. Channel selection has layers of its own, of which
the last has the bias:

- in the original `fc`, an `nn.Linear`, and `conv2d`, with `bn` between them if it has `norm`; from
  a subspace another `nn.Linear`, `subspace`, comes before, and `subspace_bn`.
- in `bsconv` `pw`, an `nn.Conv2d` of 1 × 1, and `dw`, with `bn` between them; from a subspace
  `pw1`, `bn1`, `pw2`, `bn2` and `dw`.

Every other variable is written as it is, with its name in Flax behind that of its module: what a
module of yours holds itself, the kernel of an `nnx.Einsum`, layers that `nnx.vmap` or `nnx.scan`
has stacked. Left out are random number generators, caches and intermediate values; and arrays that
are no `nnx.Variable`: they are constants, which the module's constructor makes anew.
"""

import collections
import math
import operator
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chansel_jax.conv import ChannelSelectionConv, SubKernelConv, SubspaceChannelSelectionConv
from chansel_jax.files import replaced
from chansel_jax.networks.resnet import ResNet, ResNetConfig

Parts = Literal["original", "bsconv"]
Names = Literal["torchvision", "bsconv"] | Mapping[str, str]

# What turns a layer's path in a `ResNet` into its name in a state dict, applied in this order.
_TORCHVISION = (
    (r"^input_norm$", "data_bn"),
    (r"^stem\.conv$", "conv1"),
    (r"^stem\.norm$", "bn1"),
    (r"\.norm(\d)$", r".bn\1"),
    (r"\.shortcut_norm$", ".downsample.1"),
    (r"\.shortcut$", ".downsample.0"),
    (r"^last_norm$", "last_bn"),
    (r"^classifier$", "fc"),
)
_BSCONV = (
    (r"^input_norm$", "backbone.data_bn"),
    (r"^stem\.conv$", "backbone.init_unit.conv.conv"),
    (r"^stem\.norm$", "backbone.init_unit.conv.bn"),
    (r"\.conv(\d)$", r".conv\1.conv"),
    (r"\.norm(\d)$", r".conv\1.bn"),
    (r"\.shortcut_norm$", ".projection.bn"),
    (r"\.shortcut$", ".projection.conv"),
    (r"^last_norm$", "backbone.final_activation.bn"),
    (r"^classifier$", "classifier.conv"),
)


_Shape = tuple[int, ...]
_NodePath = tuple[str | int, ...]


class _Layout(NamedTuple):
    """How PyTorch has the values of a variable: those of NumPy's `reshape`, `transpose`, `flip`.

    Attributes:
        shape: what the variable is reshaped to.
        axes: the order that its axes then have in PyTorch.
        flipped: those of PyTorch's axes that run backwards.
    """

    shape: _Shape
    axes: _Shape
    flipped: _Shape = ()


_LayoutOf = Callable[[Any, _Shape], _Layout]


class _Leaf(NamedTuple):
    """An array of a layer.

    Attributes:
        variable: the attribute of the layer that it belongs to.
        name: its name behind the layer's.
        layout: gives its layout for the layer and the variable's shape. Where the layout has other
            axes than its own shape, the layer is stacked, and PyTorch has no such array.
    """

    variable: str
    name: str
    layout: _LayoutOf


def _axes(*axes: int) -> _LayoutOf:
    return lambda layer, shape: _Layout(shape, axes)


_VECTOR, _ROWS = _axes(0), _axes(0, 1)
_MATRIX = _axes(1, 0)  # products over channels are (in, out) here and (out, in) there


def _point(layer: nnx.Module, shape: _Shape) -> _Layout:
    """Products over channels as convolutions of 1 × 1, in as many dimensions as the layer has."""
    sizes = [1 for _ in getattr(layer, "kernel_size", "HW")]
    return _Layout((*shape, *sizes), (1, 0, *range(2, 2 + len(sizes))))


def _kernel(layer: nnx.Module, shape: _Shape) -> _Layout:
    """Kernels are HWIO here and OIHW there, in any number of dimensions."""
    spatial = len(layer.kernel_size)
    return _Layout(shape, (spatial + 1, spatial, *range(spatial)))


def _transposed_kernel(layer: nnx.ConvTranspose, shape: _Shape) -> _Layout:
    """PyTorch's are IOHW, and those of the convolution that is transposed.

    So are Flax's with `transpose_kernel`, as HWOI; without it they are HWIO and run backwards.
    """
    if layer.transpose_kernel:
        return _kernel(layer, shape)
    spatial = len(layer.kernel_size)
    return _Layout(shape, (spatial, spatial + 1, *range(spatial)), tuple(range(2, 2 + spatial)))


def _general_matrix(layer: nnx.LinearGeneral, shape: _Shape) -> _Layout:
    """All axes of the input are one in PyTorch, and so are all of the output."""
    features = layer.in_features, layer.out_features
    return _Layout((*map(math.prod, features), *shape[sum(map(len, features)) :]), (1, 0))


def _general_vector(layer: nnx.LinearGeneral, shape: _Shape) -> _Layout:
    features = layer.out_features
    return _Layout((math.prod(features), *shape[len(features) :]), (0,))


_SCALE = (_Leaf("scale", "weight", _VECTOR), _Leaf("bias", "bias", _VECTOR))
_BATCH_NORM = (
    *_SCALE,
    _Leaf("mean", "running_mean", _VECTOR),
    _Leaf("var", "running_var", _VECTOR),
)


def _weighted(weight: _LayoutOf, bias: _LayoutOf = _VECTOR) -> tuple[_Leaf, ...]:
    return _Leaf("kernel", "weight", weight), _Leaf("bias", "bias", bias)


_LAYERS = {
    SubKernelConv: _weighted(_kernel),
    nnx.Conv: _weighted(_kernel),
    nnx.ConvTranspose: _weighted(_transposed_kernel),
    nnx.Linear: _weighted(_MATRIX),
    nnx.LinearGeneral: _weighted(_general_matrix, _general_vector),
    nnx.Embed: (_Leaf("embedding", "weight", _ROWS),),
    nnx.BatchNorm: _BATCH_NORM,
    nnx.LayerNorm: _SCALE,
    nnx.GroupNorm: _SCALE,
    nnx.InstanceNorm: _SCALE,
    nnx.RMSNorm: _SCALE,
    nnx.PReLU: (_Leaf("negative_slope", "weight", lambda _, shape: _Layout((*shape, 1), (0,))),),
}


def _selection(
    sums: Mapping[str, str], spatial: str, layout: _LayoutOf, norms: Mapping[str, str]
) -> tuple[_Leaf, ...]:
    """The arrays of channel selection: what its products, its kernel and its norms are called."""
    return (
        *(_Leaf(variable, f"{name}.weight", layout) for variable, name in sums.items()),
        _Leaf("depthwise", f"{spatial}.weight", _kernel),
        _Leaf("bias", f"{spatial}.bias", _VECTOR),
        *(
            _Leaf(f"{variable}.{leaf.variable}", f"{name}.{leaf.name}", leaf.layout)
            for variable, name in norms.items()
            for leaf in _BATCH_NORM
        ),
    )


_SELECTIONS = {
    "original": {
        ChannelSelectionConv: _selection({"pointwise": "fc"}, "conv2d", _MATRIX, {"norm": "bn"}),
        SubspaceChannelSelectionConv: _selection(
            {"subspace": "subspace", "pointwise": "fc"},
            "conv2d",
            _MATRIX,
            {"subspace_norm": "subspace_bn", "norm": "bn"},
        ),
    },
    "bsconv": {
        ChannelSelectionConv: _selection({"pointwise": "pw"}, "dw", _point, {"norm": "bn"}),
        SubspaceChannelSelectionConv: _selection(
            {"subspace": "pw1", "pointwise": "pw2"},
            "dw",
            _point,
            {"subspace_norm": "bn1", "norm": "bn2"},
        ),
    },
}
_MOST_TOLD = 8  # problems that an error lists; the others it counts
# What `nnx.Variable`s hold that is no part of a network's weights.
_PASSING = (nnx.RngState, nnx.Cache, nnx.Intermediate)


class _Entry(NamedTuple):
    """What an array of a state dict belongs to, and its layout there."""

    variable: nnx.Variable
    layout: _Layout


def from_torch(
    module: nnx.Module,
    state_dict: Mapping[str, Any],
    *,
    names: Names = "torchvision",
    parts: Parts | None = None,
) -> None:
    """Loads parameters and running statistics into `module`, in place.

    Args:
        module: a `ResNet` or any other module, built as the one the arrays belong to. The arrays of
            a single layer have no `NAME.` in front.
        state_dict: a PyTorch module's `state_dict()`, or the same in NumPy arrays. Convolutions
            are `NAME.weight` `(C_out, C_in/G, *kernel_size)`; channel selection has, with the parts
            of the original, `NAME.fc.weight` `(C_out·R, C_in)` and `NAME.conv2d.weight`
            `(C_out, R, *kernel_size)`, with those of `bsconv` `NAME.pw.weight`
            `(C_out·R, C_in/G, 1, 1)` and `NAME.dw.weight`. Transposed convolutions are
            `(C_in, C_out, *kernel_size)`, linear layers `(C_out, C_in)`, and so are those of an
            `nnx.LinearGeneral`, as the `query`, `key`, `value` and `out` of attention, with all
            axes of the input taken for one and all of the output; embeddings are `(N, C)`. Biases,
            norms and the slope of PReLU have one axis. Every other variable of the module is
            `NAME.ATTRIBUTE`, and as it is. All names may have the same words in front, as `module.`
            of `DataParallel` or `_orig_mod.` of `torch.compile`. Values are real (complex for
            variables that are), of any dtype and layout, and cast to the dtype of the module's
            variables. `num_batches_tracked`, which a momentum makes meaningless, is ignored.
        names: of the layers of a `ResNet`: those of torchvision (the default), which are timm's
            too, or those of the package `bsconv`. Or a mapping from the paths of layers, as
            `"encoder.0.conv"`, to names; a layer that it lacks, and every layer of another module
            without a mapping, has its path for a name. The path of a variable that is written as it
            is may be in the mapping too.
        parts: how channel selection is written; by default as in `bsconv` with its names, else as
            the original.

    Raises:
        ValueError: naming the first of the names that are missing, unexpected, without real values,
            or of a wrong shape, and counting the others; or naming a variable of the module that
            holds no array of numbers, or an argument that is wrong. Nothing is loaded then.
    """
    if not isinstance(state_dict, Mapping) or not all(isinstance(n, str) for n in state_dict):
        kind = type(state_dict).__name__
        raise ValueError(f"state_dict of type {kind} must be a mapping from names to arrays")
    entries = _entries(module, names, parts)
    prefix = _common_prefix(state_dict, entries)
    entries = {prefix + name: entry for name, entry in entries.items()}
    arrays, problems = _fitting(entries, state_dict)
    if problems:
        raise ValueError(_summary(problems))
    for name, (variable, layout) in entries.items():
        array = np.flip(arrays[name], layout.flipped).transpose(np.argsort(layout.axes))
        # A copy: on CPUs JAX would share the memory, which PyTorch goes on to change. Not by
        # jnp.asarray, which compiles a program for every shape.
        variable[...] = jax.device_put(np.array(array.reshape(variable.shape), variable.dtype))


def to_numpy(
    module: nnx.Module, *, names: Names = "torchvision", parts: Parts | None = None
) -> dict[str, np.ndarray]:
    """Parameters and running statistics with the names and shapes of a PyTorch module.

    Args:
        module: as of `from_torch`, which has the other arguments too.
        names: of its layers.
        parts: how channel selection is written.

    Returns:
        NumPy arrays that own their memory, by name, as `from_torch` takes them, of the dtypes of
        the module's variables. `num_batches_tracked` is not among them; PyTorch's strict loading
        does without.

    Raises:
        ValueError: naming a variable of the module that holds no array of numbers, or an argument
            that is wrong.
    """
    arrays = {}
    for name, (variable, layout) in _entries(module, names, parts).items():
        array = np.asarray(variable[...]).reshape(layout.shape).transpose(layout.axes)
        arrays[name] = np.array(np.flip(array, layout.flipped), order="C")
    return arrays


def to_torch(
    module: nnx.Module, *, names: Names = "torchvision", parts: Parts | None = None
) -> dict[str, Any]:
    """What `to_numpy` returns in tensors, which a PyTorch module's `load_state_dict` takes.

    Raises:
        ModuleNotFoundError: if PyTorch is not installed.
        ValueError: as of `to_numpy`.
    """
    import torch

    def tensor(array: np.ndarray) -> Any:
        # NumPy's own view of bfloat16 is none that PyTorch takes; bytes are.
        flat = torch.from_numpy(array.reshape(-1).view(np.uint8))
        return flat.view(getattr(torch, array.dtype.name)).reshape(array.shape)

    return {n: tensor(array) for n, array in to_numpy(module, names=names, parts=parts).items()}


def load_safetensors(
    module: nnx.Module,
    path: str | Path,
    *,
    names: Names = "torchvision",
    parts: Parts | None = None,
) -> None:
    """Loads a `.safetensors` file into `module`, in place; it needs the package `safetensors`.

    The arguments are those of `from_torch`.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        OSError: if the file cannot be read.
        ValueError: if it is no such file; else as of `from_torch`.
    """
    import safetensors.numpy

    try:
        arrays = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(f"path={str(path)!r} is not a safetensors file: {error}") from error
    except AttributeError as error:  # the dtype's name is looked for in NumPy
        raise ValueError(f"path={str(path)!r} holds a dtype that NumPy lacks: {error}") from error
    from_torch(module, arrays, names=names, parts=parts)


def save_safetensors(
    module: nnx.Module,
    path: str | Path,
    *,
    names: Names = "torchvision",
    parts: Parts | None = None,
) -> None:
    """Writes what `to_numpy` returns to a `.safetensors` file; it needs the package `safetensors`.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        OSError: if the file cannot be written.
        ValueError: as of `to_numpy`.
    """
    import safetensors.numpy

    arrays = to_numpy(module, names=names, parts=parts)
    with replaced(Path(path)) as partial:
        partial.write_bytes(safetensors.numpy.save(arrays, metadata={"format": "pt"}))


_Problem = tuple[str, str, str]  # the array's name, the kind of problem, and what is told of it


def _fitting(
    entries: Mapping[str, _Entry], state_dict: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], list[_Problem]]:
    """The arrays of `state_dict` that `entries` ask for, and all that does not fit."""
    problems = [(name, "missing", "") for name in entries if name not in state_dict]
    problems += [
        (name, "unexpected", "")
        for name in state_dict
        if name not in entries and not name.endswith("num_batches_tracked")
    ]
    arrays, first_of = {}, {}
    for name, (variable, layout) in entries.items():
        if name not in state_dict:
            continue
        try:
            array = _numbers(state_dict[name], variable.dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            told = f"no values that can be taken: {str(error).splitlines()[0]}"
            problems.append((name, "without values", told))
            continue
        shape = tuple(layout.shape[axis] for axis in layout.axes)
        if array.shape != shape:
            problems.append((name, "of another shape", f"shape {array.shape}, not {shape}"))
        arrays[name] = array
        first = first_of.setdefault(id(variable), name)
        if not np.array_equal(arrays[first], array, equal_nan=True):
            problems.append((name, "tied", f"other values than {first}, with which it is tied"))
    return arrays, problems


def _summary(problems: Collection[_Problem]) -> str:
    """How many problems of each kind there are, and the first of them, a line each."""
    counts = collections.Counter(kind for _, kind, _ in problems)
    counted = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    lines = [
        f"{name} has {told}" if told else f"{name} is {kind}"
        for name, kind, told in list(problems)[:_MOST_TOLD]
    ]
    more = len(problems) - len(lines)
    lines += [f"and {more} more"] if more else []
    return "\n".join([f"state_dict does not fit the network ({counted}):", *lines])


def _common_prefix(given: Collection[str], wanted: Collection[str]) -> str:
    """What stands before the names that are `wanted` in most of those `given`; mostly `""`."""
    found = collections.Counter(
        name[:start]
        for name in given
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if name[start:] in wanted
    )
    prefix = max(found, key=found.get, default="")
    # A few may end like one that is wanted by chance.
    counted = sum(not name.endswith("num_batches_tracked") for name in given)
    return prefix if 2 * found[prefix] > counted else ""


def _numbers(value: Any, dtype: np.dtype) -> np.ndarray:
    """The values of a tensor of PyTorch, or of what NumPy takes for an array, for a `dtype`.

    Raises:
        TypeError: if they are not real numbers, nor complex ones for a complex `dtype`.
        RuntimeError: PyTorch's, if there are none.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu().to_dense()  # which a tensor without values refuses
        # NumPy lacks some of PyTorch's dtypes; float64 holds the values of them all.
        value = (value.double() if value.is_floating_point() else value).numpy(force=True)
    array = np.asarray(value)
    kind = jnp.number if jnp.issubdtype(dtype, jnp.complexfloating) else jnp.floating
    if not any(jnp.issubdtype(array.dtype, each) for each in (kind, jnp.integer, bool)):
        raise TypeError(f"{array.dtype} is no dtype of real numbers")
    return array


def _entries(module: nnx.Module, names: Names, parts: Parts | None) -> dict[str, _Entry]:
    """The arrays of a state dict by name."""
    if parts not in (None, *_SELECTIONS):
        choices = ", ".join(map(repr, _SELECTIONS))
        raise ValueError(f"parts={parts!r} must be one of {choices}, or None")
    known = _LAYERS | _SELECTIONS[parts or ("bsconv" if names == "bsconv" else "original")]
    if names == "bsconv":
        known[nnx.Linear] = _weighted(_point)  # as convolutions of 1 × 1
    nodes = list(nnx.iter_graph(module, graph=True))
    layers = {path: node for path, node in nodes if isinstance(node, nnx.Module)}
    found = list(_in_torch(layers, known))
    taken = {id(entry.variable) for *_, entry in found}
    others = dict(_as_they_are(node for node in nodes if id(node[1]) not in taken))
    found += [(path, "", entry) for path, entry in others.items()]
    name_of, entries, owners = _namer(module, names, layers, others), {}, {}
    for path, name_behind, entry in found:
        name = _joined(name_of(path), name_behind)
        if name in entries:
            raise ValueError(f"names: {owners[name]} and {_joined(*path)} would both have {name!r}")
        entries[name], owners[name] = entry, _joined(*path)
    return entries


def _in_torch(
    layers: Mapping[_NodePath, nnx.Module], known: Mapping[type, Collection[_Leaf]]
) -> Iterator[tuple[_NodePath, str, _Entry]]:
    """What the layers that PyTorch has too hold, with its name behind the layer's."""
    selections = {path for path, layer in layers.items() if isinstance(layer, ChannelSelectionConv)}
    for path, layer in layers.items():
        if path and path[:-1] in selections:
            continue  # a norm of channel selection, which is one of its arrays
        kind = next((kind for kind in type(layer).__mro__ if kind in known), None)
        for leaf in known.get(kind, ()):
            *holders, attribute = leaf.variable.split(".")
            holder = operator.attrgetter(*holders)(layer) if holders else layer
            variable = getattr(holder, attribute, None)
            if not isinstance(variable, nnx.Variable):
                continue  # None mostly
            layout = leaf.layout(layer, variable.shape)
            if len(layout.shape) == len(layout.axes):
                yield path, leaf.name, _Entry(variable, layout)


def _as_they_are(nodes: Iterable[tuple[_NodePath, Any]]) -> Iterator[tuple[_NodePath, _Entry]]:
    """The variables among `nodes`, in Flax's layout.

    Raises:
        ValueError: naming one that holds no array of numbers.
    """
    for path, node in nodes:
        if not isinstance(node, nnx.Variable) or isinstance(node, _PASSING):
            continue
        dtype = getattr(node, "dtype", None)
        if dtype is None or not any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, bool)):
            raise ValueError(f"{_joined(*path)} holds no array of numbers")
        yield path, _Entry(node, _Layout(node.shape, tuple(range(node.ndim))))


def _joined(*parts: str | int) -> str:
    return ".".join(str(part) for part in parts if part != "")


def _namer(
    module: nnx.Module, names: Names, layers: Collection[_NodePath], others: Collection[_NodePath]
) -> Callable[[_NodePath], str]:
    """What gives the name for the path of a layer, or of a variable that is written as it is."""
    if names not in ("torchvision", "bsconv") and not isinstance(names, Mapping):
        raise ValueError(f"names={names!r} must be 'torchvision', 'bsconv' or a mapping")
    given = names if isinstance(names, Mapping) else {}
    if isinstance(module, ResNet) and given is not names:
        given = {_joined(*path): _resnet_name(path, module.config, names) for path in layers}
    if unknown := given.keys() - {_joined(*path) for path in (*layers, *others)}:
        raise ValueError(f"names: {min(unknown, key=str)!r} is no layer of the module")
    for path, name in given.items():
        if path and (not isinstance(name, str) or not name):
            raise ValueError(f"names[{path!r}]={name!r} must be a name")

    def name_of(path: _NodePath) -> str:
        if (dotted := _joined(*path)) in given:
            return given[dotted]
        # A layer's is its path; a variable's follows from that of what holds it.
        return dotted if path in layers or not path else _joined(name_of(path[:-1]), path[-1])

    return name_of


def _resnet_name(path: _NodePath, config: ResNetConfig, names: str) -> str:
    """The name of a layer of a `ResNet`."""
    name = _joined(*path)
    for pattern, replacement in {"torchvision": _TORCHVISION, "bsconv": _BSCONV}[names]:
        name = re.sub(pattern, replacement, name)
    if path[:1] != ("blocks",) or len(path) < 2:
        return name
    stages = [(s, b) for s, count in enumerate(config.blocks) for b in range(count)]
    stage, block = stages[path[1]]
    rest = name.removeprefix(f"blocks.{path[1]}")
    if names == "torchvision":
        return f"layer{stage + 1}.{block}{rest}"
    if config.block == "preactivation":  # its norms belong to the convolutions before them
        rest = {".conv1.bn": ".bn", ".conv2.bn": ".conv1.bn"}.get(rest, rest)
    return f"backbone.stage{stage + 1}.unit{block + 1}{rest}"
