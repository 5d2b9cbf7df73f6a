"""PyTorch state dicts in and out of a `ResNet`, without importing PyTorch.

Names are torchvision's: `conv1`, `bn1`, `layer1.0.conv1`, `layer2.0.downsample.0`, `fc`. Where a
convolution is channel selection, its two parts are `fc`, an `nn.Linear` without bias, and `conv2d`,
a grouped `nn.Conv2d` that has the bias; BatchNorm between them is `bn`.
"""

import collections
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from chansel_jax.conv import ChannelSelectionConv, SubKernelConv, SubspaceChannelSelectionConv

# What turns a layer's path in a `ResNet` into its name in a state dict, applied in this order. The
# number of a block has become that of its stage and its own within the stage before.
_LAYER_NAMES = (
    (r"^input_norm$", "data_bn"),
    (r"^last_norm$", "last_bn"),
    (r"^stem\.conv", "conv1"),
    (r"^stem\.norm", "bn1"),
    (r"\.norm([123])$", r".bn\1"),
    (r"\.shortcut_norm$", ".downsample.1"),
    (r"\.shortcut", ".downsample.0"),
    (r"\.subspace_norm$", ".subspace_bn"),
    (r"\.norm$", ".bn"),
    (r"^classifier$", "fc"),
)

# Variable of a layer, its name in a state dict, and which of its axes the axes of the array there
# are. Kernels are HWIO here and OIHW there (`_KERNEL`, in any number of dimensions), a linear
# layer's (in, out) and (out, in).
_KERNEL = "kernel"
_VARIABLES = {
    SubKernelConv: (("kernel", "weight", _KERNEL), ("bias", "bias", (0,))),
    ChannelSelectionConv: (
        ("pointwise", "fc.weight", (1, 0)),
        ("depthwise", "conv2d.weight", _KERNEL),
        ("bias", "conv2d.bias", (0,)),
    ),
    SubspaceChannelSelectionConv: (
        ("subspace", "subspace.weight", (1, 0)),
        ("pointwise", "fc.weight", (1, 0)),
        ("depthwise", "conv2d.weight", _KERNEL),
        ("bias", "conv2d.bias", (0,)),
    ),
    nnx.BatchNorm: (
        ("scale", "weight", (0,)),
        ("bias", "bias", (0,)),
        ("mean", "running_mean", (0,)),
        ("var", "running_var", (0,)),
    ),
    nnx.Linear: (("kernel", "weight", (1, 0)), ("bias", "bias", (0,))),
}


def from_torch(network: nnx.Module, state_dict: Mapping[str, Any]) -> None:
    """Loads parameters and running statistics into `network`, in place.

    Args:
        network: a `ResNet` built with the configuration the arrays belong to, or a single
            convolution, whose arrays have no `NAME.` in front.
        state_dict: a PyTorch module's `state_dict()`, or the same in NumPy arrays. Convolutions
            are `NAME.weight` `(C_out, C_in, K_h, K_w)` or, where they are channel selection,
            `NAME.fc.weight` `(C_out·R, C_in)` and `NAME.conv2d.weight` `(C_out, R, K_h, K_w)`; the
            last layer is `fc.weight` `(num_classes, C)`; everything else has one axis. All names
            may have the same words in front, as `module.` of `DataParallel` or `_orig_mod.` of
            `torch.compile`. Values are real, of any dtype and layout, and cast to the dtype of the
            network's variables. `num_batches_tracked`, which a momentum makes meaningless, is
            ignored.

    Raises:
        ValueError: listing all names that are missing, unexpected, without real values, or of a
            wrong shape; or naming a layer of the network that has no PyTorch counterpart. Nothing
            is loaded then.
    """
    entries = {name: (variable, axes) for name, variable, axes in _entries(network)}
    given = {n: value for n, value in state_dict.items() if not n.endswith("num_batches_tracked")}
    prefix = _common_prefix(given, entries)
    entries = {prefix + name: entry for name, entry in entries.items()}
    problems = [f"{name} is missing" for name in entries if name not in given]
    problems += [f"{name} is unexpected" for name in given if name not in entries]
    arrays = {}
    for name, (variable, axes) in entries.items():
        if name not in given:
            continue
        shape = tuple(variable.shape[axis] for axis in axes)
        try:
            arrays[name] = _real_array(given[name])
        except (TypeError, ValueError, RuntimeError) as error:
            problems.append(f"{name} has no values that can be taken: {str(error).splitlines()[0]}")
        else:
            if arrays[name].shape != shape:
                problems.append(f"{name} has shape {arrays[name].shape}, not {shape}")
    if problems:
        raise ValueError("state_dict does not fit the network:\n" + "\n".join(problems))
    for name, (variable, axes) in entries.items():
        # A copy: on CPUs JAX would share the memory, which PyTorch goes on to change.
        array = np.array(arrays[name].transpose(np.argsort(axes)))
        variable[...] = jnp.asarray(array, variable.dtype)


def to_torch(network: nnx.Module) -> dict[str, np.ndarray]:
    """Parameters and running statistics as a PyTorch module's `load_state_dict` takes them.

    Returns:
        NumPy arrays that own their memory, by name, with the shapes `from_torch` takes and the
        dtypes of the network's variables. `num_batches_tracked` is not among them; PyTorch's strict
        loading does without.

    Raises:
        ValueError: naming a layer of the network that has no PyTorch counterpart.
    """
    return {
        name: np.array(np.asarray(variable[...]).transpose(axes), order="C")
        for name, variable, axes in _entries(network)
    }


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


def _entries(network: nnx.Module) -> Iterator[tuple[str, nnx.Variable, tuple[int, ...]]]:
    """Each array of a state dict: its name, the variable it belongs to, and its axes there."""
    for path, layer in nnx.iter_modules(network):
        name = _layer_name(path, network)
        has_parameters = any(isinstance(value, nnx.Param) for value in vars(layer).values())
        if type(layer) not in _VARIABLES and has_parameters:
            raise ValueError(
                f"{name} is a {type(layer).__name__}, which has no PyTorch counterpart"
            )
        for attribute, leaf, axes in _VARIABLES.get(type(layer), ()):
            variable = getattr(layer, attribute)
            if variable is None:
                continue
            if axes is _KERNEL:
                dimensions = len(variable.shape) - 2
                axes = (dimensions + 1, dimensions, *range(dimensions))
            yield f"{name}.{leaf}" if path else leaf, variable, axes


def _layer_name(path: tuple[str | int, ...], network: nnx.Module) -> str:
    if path[:1] == ("blocks",) and len(path) > 1:
        sizes = enumerate(network.config.blocks, 1)
        stages = [f"layer{stage}.{i}" for stage, n in sizes for i in range(n)]
        path = (stages[path[1]], *path[2:])
    name = ".".join(map(str, path))
    for pattern, replacement in _LAYER_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
