"""PyTorch state dicts in and out of a `ResNet`, without importing PyTorch.

Names are torchvision's: `conv1`, `bn1`, `layer1.0.conv1`, `layer2.0.downsample.0`, `fc`. Where a
convolution is channel selection, its two parts are `fc`, an `nn.Linear` without bias, and `conv2d`,
a grouped `nn.Conv2d` that has the bias; BatchNorm between them is `bn`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from chansel_jax.conv import ChannelSelectionConv, SubKernelConv

# What turns a layer's path in a `ResNet` into its name in a state dict, applied in this order. The
# number of a block has become that of its stage and its own within the stage before.
_LAYER_NAMES = (
    (r"^stem\.conv", "conv1"),
    (r"^stem\.norm", "bn1"),
    (r"\.norm([12])$", r".bn\1"),
    (r"\.shortcut_norm$", ".downsample.1"),
    (r"\.shortcut", ".downsample.0"),
    (r"\.norm$", ".bn"),
    (r"^classifier$", "fc"),
)

# Variable of a layer, its name in a state dict, and which of its axes the axes of the array there
# are. Kernels are HWIO here and OIHW there, a linear layer's (in, out) and (out, in).
_VARIABLES = {
    SubKernelConv: (("kernel", "weight", (3, 2, 0, 1)), ("bias", "bias", (0,))),
    ChannelSelectionConv: (
        ("pointwise", "fc.weight", (1, 0)),
        ("depthwise", "conv2d.weight", (3, 2, 0, 1)),
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
            last layer is `fc.weight` `(num_classes, C)`; everything else has one axis. Values are
            cast to the dtype of the network's variables. `num_batches_tracked`, which a momentum
            makes meaningless, is ignored.

    Raises:
        ValueError: listing all names that are missing, unexpected, or of a wrong shape; or naming
            a layer of the network that has no PyTorch counterpart. Nothing is loaded then.
    """
    entries = {name: (variable, axes) for name, variable, axes in _entries(network)}
    arrays = {
        name: value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
        for name, value in state_dict.items()
        if not name.endswith("num_batches_tracked")
    }
    shapes = {name: tuple(v.shape[axis] for axis in axes) for name, (v, axes) in entries.items()}
    problems = [f"{name} is missing" for name in entries if name not in arrays]
    problems += [f"{name} is unexpected" for name in arrays if name not in entries]
    problems += [
        f"{name} has shape {arrays[name].shape}, not {shape}"
        for name, shape in shapes.items()
        if name in arrays and arrays[name].shape != shape
    ]
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
            if variable is not None:
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
