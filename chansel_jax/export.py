"""A trained module as a program that runs where neither it nor this package is: StableHLO.

What is exported has the parameters in it. `jax.export.deserialize` reads it again; JAX keeps such
programs readable for at least six months.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from chansel_jax.conv import ChannelSelectionConv, SubKernelConv
from chansel_jax.files import replaced
from chansel_jax.ops.lowerings import NATIVE
from chansel_jax.ops.window import is_int

PLATFORMS = ("cpu", "cuda", "tpu")
KNOWN_PLATFORMS = (*PLATFORMS, "rocm")


def to_stablehlo(
    module: nnx.Module,
    shape: Sequence[int | str | None],
    *,
    dtype: DTypeLike = jnp.float32,
    mean: ArrayLike | None = None,
    std: ArrayLike | None = None,
    constraints: Sequence[str] = (),
    platforms: Sequence[str] = PLATFORMS,
) -> jax.export.Exported:
    """The program that computes `module(x)` in evaluation mode, for one array `x`.

    `nnx.Sequential(network, jax.nn.softmax)` gives probabilities in the place of logits.

    Args:
        module: any NNX module with a `__call__` of one array; it stays as it is.
        shape: of `x`, as `(None, 32, 32, 3)`. None is any size; two of them may differ. A text is
            an expression, where the module needs it, as `("n", "8*h", "8*w", 3)`.
        dtype: of `x`; float32 by default. With `jnp.uint8` the program takes images as they are in
            files.
        mean: `(C,)`; if given, the module is called with `(x - mean) / std`, float32.
        std: `(C,)`; 1 by default.
        constraints: what holds of the sizes in `shape`, as `("h >= 2",)`.
        platforms: the program runs on these.

    Returns:
        The program. Its `call(x)` runs it, its `serialize()` are the bytes of a file. It holds no
        code of this package: layers that ask for a lowering in C++ have another in it.

    Raises:
        ValueError: naming the argument that is wrong, and its value; or, as JAX says it, if the
            module cannot be computed for all sizes of `shape`.
        TypeError: if `module` is no NNX module.
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module={module!r} must be an nnx.Module")
    if mean is None and std is not None:
        raise ValueError(f"std={std} needs mean")
    if not platforms or not set(platforms) <= set(KNOWN_PLATFORMS):
        known = ", ".join(map(repr, KNOWN_PLATFORMS))
        raise ValueError(f"platforms={tuple(platforms)} must be some of {known}")
    network = nnx.clone(module)
    network.eval()
    for _, layer in nnx.iter_modules(network):
        if isinstance(layer, ChannelSelectionConv | SubKernelConv) and layer.lowering in NATIVE:
            layer.lowering = "auto"
    graph, state = nnx.split(network)
    sizes, statistics = _sizes(shape, constraints), _statistics(mean, std, shape)

    def call(x: jax.Array) -> jax.Array:
        if statistics is not None:
            x = (x.astype(jnp.float32) - statistics[0]) / statistics[1]
        with jax.numpy_dtype_promotion("standard"):  # which Flax needs for several dtypes
            return nnx.merge(graph, state, copy=True)(x)  # a copy, whose variables may be written

    inputs = jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))
    return jax.export.export(jax.jit(call), platforms=tuple(platforms))(inputs)


def save_stablehlo(program: jax.export.Exported, path: str | Path) -> None:
    """Writes `program` to a file, as a whole or not at all; it needs the package `flatbuffers`.

    `jax.export.deserialize(bytearray(Path(path).read_bytes()))` reads it again.

    Raises:
        ModuleNotFoundError: if the package is not installed.
        OSError: if the file cannot be written.
        TypeError: if `program` is no such program.
    """
    if not isinstance(program, jax.export.Exported):
        raise TypeError(f"program of type {type(program).__name__} must be one of to_stablehlo")
    content = program.serialize()
    with replaced(Path(path)) as partial:
        partial.write_bytes(content)


def load_stablehlo(path: str | Path) -> jax.export.Exported:
    """The program in a file that `save_stablehlo` has written.

    Raises:
        ModuleNotFoundError: if the package `flatbuffers` is not installed.
        OSError: if the file cannot be read.
        ValueError: if it holds no such program.
    """
    content = bytearray(Path(path).read_bytes())
    try:
        return jax.export.deserialize(content)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # flatbuffers has none of its own for other bytes
        raise ValueError(f"path={path} holds no StableHLO program of jax.export") from error


def _statistics(
    mean: ArrayLike | None, std: ArrayLike | None, shape: Sequence[int | str | None]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Mean and standard deviation, of as many axes as `shape` has; None if there is no mean."""
    if mean is None:
        return None
    channels, others = shape[-1], (1,) * (len(shape) - 1)
    mean, std = (np.asarray(values, np.float32) for values in (mean, 1 if std is None else std))
    for name, values in (("mean", mean), ("std", std)):
        if values.shape not in ((), (1,), (channels,)):
            raise ValueError(f"{name}={values} must be one number for each channel: ({channels},)")
    if not (std > 0).all():
        raise ValueError(f"std={std} must be above 0")
    return mean.reshape(*others, -1), std.reshape(*others, -1)


def _sizes(shape: Sequence[int | str | None], constraints: Sequence[str]) -> tuple:
    """`shape` as JAX takes it, with a name for each None."""
    if not isinstance(shape, Sequence) or not shape:
        raise ValueError(f"shape={shape!r} must be a sequence of one size or more")
    for size in shape:
        if not (size is None or isinstance(size, str) or (is_int(size) and size > 0)):
            raise ValueError(
                f"shape={tuple(shape)} must have sizes above 0, None, or texts as '8*h'"
            )
    names = [f"size{i}" if size is None else str(size) for i, size in enumerate(shape)]
    return jax.export.symbolic_shape(", ".join(names), constraints=constraints)
