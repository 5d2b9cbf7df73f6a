"""Weights of PyTorch in and out: state dicts and `.safetensors` files.

A layer of a module has a name in a state dict, and its arrays have names behind that. The layers of
a `ResNet` have those of torchvision, which are timm's too, or those of the package `bsconv`; those
of any other module their own path, or what a mapping says. A dense convolution has `weight` and
`bias`; channel selection has layers of its own, of which the last has the bias:

- in the original `fc`, an `nn.Linear`, and `conv2d`, with `bn` between them if it has `norm`; from
  a subspace another `nn.Linear`, `subspace`, comes before, and `subspace_bn`.
- in `bsconv` `pw`, an `nn.Conv2d` of 1 × 1, and `dw`, with `bn` between them; from a subspace
  `pw1`, `bn1`, `pw2`, `bn2` and `dw`.
"""

import collections
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from chansel_jax.conv import ChannelSelectionConv, SubKernelConv, SubspaceChannelSelectionConv
from chansel_jax.files import replaced

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


class _Leaf(NamedTuple):
    """An array of a layer.

    Attributes:
        variable: the attribute of the layer that it belongs to.
        name: its name behind the layer's.
        axes: which of the variable's axes its own axes are; an axis of one element is None.
            Kernels are HWIO here and OIHW there (`_KERNEL`, in any number of dimensions), products
            over channels (in, out) and (out, in), with axes for the kernel if `_POINT`.
    """

    variable: str
    name: str
    axes: tuple[int | None, ...] | str


_KERNEL, _POINT, _VECTOR, _MATRIX = "kernel", "point", (0,), (1, 0)
_SCALE = (_Leaf("scale", "weight", _VECTOR), _Leaf("bias", "bias", _VECTOR))
_BATCH_NORM = (
    *_SCALE,
    _Leaf("mean", "running_mean", _VECTOR),
    _Leaf("var", "running_var", _VECTOR),
)
_CONV = (_Leaf("kernel", "weight", _KERNEL), _Leaf("bias", "bias", _VECTOR))
_LAYERS = {
    SubKernelConv: _CONV,
    nnx.Conv: _CONV,
    nnx.Linear: (_Leaf("kernel", "weight", _MATRIX), _Leaf("bias", "bias", _VECTOR)),
    nnx.BatchNorm: _BATCH_NORM,
    nnx.LayerNorm: _SCALE,
    nnx.GroupNorm: _SCALE,
    nnx.Embed: (_Leaf("embedding", "weight", (0, 1)),),
}


def _selection(
    sums: Mapping[str, str], spatial: str, axes: Any, norms: Mapping[str, str]
) -> tuple[_Leaf, ...]:
    """The arrays of channel selection: what its products, its kernel and its norms are called."""
    return (
        *(_Leaf(variable, f"{name}.weight", axes) for variable, name in sums.items()),
        _Leaf("depthwise", f"{spatial}.weight", _KERNEL),
        _Leaf("bias", f"{spatial}.bias", _VECTOR),
        *(
            _Leaf(f"{variable}.{leaf.variable}", f"{name}.{leaf.name}", leaf.axes)
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
        ChannelSelectionConv: _selection({"pointwise": "pw"}, "dw", _POINT, {"norm": "bn"}),
        SubspaceChannelSelectionConv: _selection(
            {"subspace": "pw1", "pointwise": "pw2"},
            "dw",
            _POINT,
            {"subspace_norm": "bn1", "norm": "bn2"},
        ),
    },
}
_MOST_TOLD = 8  # problems that an error lists; the others it counts


def from_torch(
    module: nnx.Module,
    state_dict: Mapping[str, Any],
    *,
    names: Names = "torchvision",
    parts: Parts | None = None,
) -> None:
    """Loads parameters and running statistics into `module`, in place.

    Args:
        module: a `ResNet`, or any other module of convolutions, linear layers, embeddings and
            normalisations, built as the one the arrays belong to. The arrays of a single layer have
            no `NAME.` in front.
        state_dict: a PyTorch module's `state_dict()`, or the same in NumPy arrays. Convolutions
            are `NAME.weight` `(C_out, C_in/G, *kernel_size)`; channel selection has, with the parts
            of the original, `NAME.fc.weight` `(C_out·R, C_in)` and `NAME.conv2d.weight`
            `(C_out, R, *kernel_size)`, with those of `bsconv` `NAME.pw.weight`
            `(C_out·R, C_in/G, 1, 1)` and `NAME.dw.weight`; linear layers are `(C_out, C_in)`;
            everything else has one axis. All names may have the same words in front, as `module.`
            of `DataParallel` or `_orig_mod.` of `torch.compile`. Values are real, of any dtype and
            layout, and cast to the dtype of the module's variables. `num_batches_tracked`, which a
            momentum makes meaningless, is ignored.
        names: of the layers of a `ResNet`: those of torchvision (the default), which are timm's
            too, or those of the package `bsconv`. Or a mapping from the paths of layers, as
            `"encoder.0.conv"`, to names; a layer that it lacks, and every layer of another module
            without a mapping, has its path for a name.
        parts: how channel selection is written; by default as in `bsconv` with its names, else as
            the original.

    Raises:
        ValueError: naming the first of the names that are missing, unexpected, without real values,
            or of a wrong shape, and counting the others; or naming a layer of the module that has
            no PyTorch counterpart, or an argument that is wrong. Nothing is loaded then.
    """
    if not isinstance(state_dict, Mapping) or not all(isinstance(n, str) for n in state_dict):
        kind = type(state_dict).__name__
        raise ValueError(f"state_dict of type {kind} must be a mapping from names to arrays")
    entries = {name: (variable, axes) for name, variable, axes in _entries(module, names, parts)}
    given = {n: value for n, value in state_dict.items() if not n.endswith("num_batches_tracked")}
    prefix = _common_prefix(given, entries)
    entries = {prefix + name: entry for name, entry in entries.items()}
    problems = [(name, "missing", "") for name in entries if name not in given]
    problems += [(name, "unexpected", "") for name in given if name not in entries]
    arrays = {}
    for name, (variable, axes) in entries.items():
        if name not in given:
            continue
        shape = tuple(1 if axis is None else variable.shape[axis] for axis in axes)
        try:
            arrays[name] = _real_array(given[name])
        except (TypeError, ValueError, RuntimeError) as error:
            told = f"no values that can be taken: {str(error).splitlines()[0]}"
            problems.append((name, "without values", told))
        else:
            if arrays[name].shape != shape:
                told = f"shape {arrays[name].shape}, not {shape}"
                problems.append((name, "of another shape", told))
    first_of = {}
    for name in arrays:
        first = first_of.setdefault(id(entries[name][0]), name)
        if not np.array_equal(arrays[first], arrays[name], equal_nan=True):
            problems.append((name, "tied", f"other values than {first}, with which it is tied"))
    if problems:
        raise ValueError(_summary(problems))
    for name, (variable, axes) in entries.items():
        real = [axis for axis in axes if axis is not None]
        array = arrays[name].reshape([variable.shape[axis] for axis in real])
        # A copy: on CPUs JAX would share the memory, which PyTorch goes on to change.
        variable[...] = jnp.asarray(np.array(array.transpose(np.argsort(real))), variable.dtype)


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
        ValueError: naming a layer of the module that has no PyTorch counterpart, or an argument
            that is wrong.
    """
    arrays = {}
    for name, variable, axes in _entries(module, names, parts):
        array = np.asarray(variable[...])
        array = array.transpose([axis for axis in axes if axis is not None])
        added = [place for place, axis in enumerate(axes) if axis is None]
        arrays[name] = np.array(np.expand_dims(array, added), order="C")
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
        flat = torch.frombuffer(bytearray(array.tobytes()), dtype=getattr(torch, array.dtype.name))
        return flat.reshape(array.shape)

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


def _summary(problems: Collection[tuple[str, str, str]]) -> str:
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
    """What stands before the names that are `wanted` in the most of those `given`; mostly `""`."""
    found = collections.Counter(
        name[:start]
        for name in given
        for start in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if name[start:] in wanted
    )
    return max(found, key=found.get, default="")


def _real_array(value: Any) -> np.ndarray:
    """The values of a tensor of PyTorch, or of what NumPy takes for an array.

    Raises:
        TypeError: if they are not real numbers.
        RuntimeError: PyTorch's, if there are none.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu().to_dense()  # which a tensor without values refuses
        # NumPy lacks some of PyTorch's dtypes; float64 holds the values of all but the complex.
        value = (value if value.is_complex() else value.double()).numpy(force=True)
    array = np.asarray(value)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, bool)):
        raise TypeError(f"{array.dtype} is no dtype of real numbers")
    return array


def _entries(
    module: nnx.Module, names: Names, parts: Parts | None
) -> Iterator[tuple[str, nnx.Variable, tuple[int | None, ...]]]:
    """Each array of a state dict: its name, the variable it belongs to, and its axes there."""
    if parts not in (None, *_SELECTIONS):
        choices = ", ".join(map(repr, _SELECTIONS))
        raise ValueError(f"parts={parts!r} must be one of {choices}, or None")
    known = _LAYERS | _SELECTIONS[parts or ("bsconv" if names == "bsconv" else "original")]
    name_of, layers = _namer(module, names), list(nnx.iter_modules(module))
    selections = {path for path, layer in layers if isinstance(layer, ChannelSelectionConv)}
    owners, taken = {}, set()
    for path, layer in layers:
        if path and path[:-1] in selections:
            continue  # a norm of channel selection, which is one of its arrays
        name = name_of(path)
        has_parameters = any(isinstance(value, nnx.Param) for value in vars(layer).values())
        if type(layer) not in known and has_parameters:
            told = f"{name} is" if path else "module is"
            raise ValueError(f"{told} a {type(layer).__name__}, which has no PyTorch counterpart")
        for leaf in known.get(type(layer), ()):
            *holders, attribute = leaf.variable.split(".")
            holder = operator.attrgetter(*holders)(layer) if holders else layer
            variable = getattr(holder, attribute, None)
            if variable is None:
                continue
            axes = _axes(layer, leaf, as_conv=names == "bsconv")
            if len(variable.shape) != sum(axis is not None for axis in axes):
                raise ValueError(
                    f"{name} is stacked, as by nnx.vmap or nnx.scan: its {leaf.variable} has the "
                    f"shape {variable.shape}"
                )
            full = f"{name}.{leaf.name}" if path else leaf.name
            if (other := owners.setdefault(full, path)) != path:
                both = " and ".join(".".join(map(str, each)) for each in (other, path))
                raise ValueError(f"names: {both} would both have {full!r}")
            taken.add(id(variable))
            yield full, variable, axes
    for path, node in nnx.iter_graph(module, graph=True):
        if isinstance(node, nnx.Param) and id(node) not in taken:
            where = ".".join(map(str, path))
            raise ValueError(f"{where} is a parameter that has no PyTorch counterpart")


def _axes(layer: nnx.Module, leaf: _Leaf, *, as_conv: bool) -> tuple[int | None, ...]:
    """The axes of a leaf; in `bsconv` linear layers are convolutions of 1 × 1."""
    if leaf.axes is _KERNEL:
        dimensions = len(layer.kernel_size)
        return dimensions + 1, dimensions, *range(dimensions)
    if leaf.axes is _POINT:
        return *_MATRIX, *(None for _ in layer.kernel_size)
    if as_conv and isinstance(layer, nnx.Linear) and leaf.axes == _MATRIX:
        return *_MATRIX, None, None
    return leaf.axes


def _namer(module: nnx.Module, names: Names) -> Callable[[tuple[str | int, ...]], str]:
    """What gives a layer's name for its path."""
    if isinstance(names, Mapping):
        paths = {".".join(map(str, path)) for path, _ in nnx.iter_modules(module)}
        if unknown := names.keys() - paths:
            raise ValueError(f"names: {min(unknown, key=str)!r} is no layer of the module")
        for path, name in names.items():
            if not isinstance(name, str) or not name:
                raise ValueError(f"names[{path!r}]={name!r} must be a name")
        return lambda path: names.get(".".join(map(str, path)), ".".join(map(str, path)))
    if names not in ("torchvision", "bsconv"):
        raise ValueError(f"names={names!r} must be 'torchvision', 'bsconv' or a mapping")
    config = getattr(module, "config", None)
    patterns = {"torchvision": _TORCHVISION, "bsconv": _BSCONV}[names]
    stages = [(s, b) for s, count in enumerate(getattr(config, "blocks", ())) for b in range(count)]

    def name_of(path: tuple[str | int, ...]) -> str:
        name = ".".join(map(str, path))
        if not stages:
            return name
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        if path[:1] != ("blocks",) or len(path) < 2:
            return name
        stage, block = stages[path[1]]
        rest = name.removeprefix(f"blocks.{path[1]}")
        if names == "torchvision":
            return f"layer{stage + 1}.{block}{rest}"
        if config.block == "preactivation":  # its norms belong to the convolutions before them
            rest = {".conv1.bn": ".bn", ".conv2.bn": ".conv1.bn"}.get(rest, rest)
        return f"backbone.stage{stage + 1}.unit{block + 1}{rest}"

    return name_of
