"""Channel selection, the dense convolution and batch normalisation in C++ for CPUs.

A small library of XLA custom calls, compiled when the package is installed where a C++ compiler is
at hand. Of channel selection, each image's weighted sums stay in cache: forward reads the input and
writes the output once, backward computes the sums anew instead of keeping them. Gradients are the
same bit for bit for any number of threads.
"""

import ctypes
import functools
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from chansel_jax.errors import OneLineError
from chansel_jax.ops.window import Pair, Window

EXACT_DTYPES = ("float32", "float64")  # in which outputs are stored as they were computed
DTYPES = (*EXACT_DTYPES, "bfloat16")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
LIMIT = "CHANSEL_JAX_INSTRUCTION_SET"  # an environment variable: no instruction set beyond it
MOST_NUMBERS = 2**48
MOST_LANES = 16  # of a vector


class InstructionSetError(OneLineError, ValueError):
    """The environment variable `LIMIT` is none of `INSTRUCTION_SETS`."""


def available() -> bool:
    """Whether the library was compiled when the package was installed, and fits this jaxlib.

    Raises:
        InstructionSetError: if the environment variable `LIMIT` is set to none of
            `INSTRUCTION_SETS`; so wherever the library is asked for.
    """
    return isinstance(_library(), ctypes.CDLL)


def why_not() -> str:
    """What is in the way of the library; empty if it is available."""
    return "" if available() else _library()


def instruction_set() -> str:
    """Which of `INSTRUCTION_SETS` it computes with: the best that the processor has.

    `"baseline"` is what every processor of its kind has, vectors of 16 bytes. The environment
    variable `CHANSEL_JAX_INSTRUCTION_SET` names the most that is taken, if it is set.

    Raises:
        RuntimeError: if the library is not available.
    """
    return INSTRUCTION_SETS[_compiled().ChanselInstructionSet()]


def limit_instruction_set(most: str = INSTRUCTION_SETS[-1]) -> None:
    """Computes with no instruction set beyond `most`, whatever `LIMIT` says, to compare them.

    Raises:
        ValueError: if `most` is none of `INSTRUCTION_SETS`.
        RuntimeError: if the library is not available.
    """
    if most not in INSTRUCTION_SETS:
        raise ValueError(f"most={most!r} must be one of {INSTRUCTION_SETS}")
    _compiled().ChanselLimitInstructionSet(INSTRUCTION_SETS.index(most))


def channel_selection(
    x: jax.Array,
    pointwise: jax.Array,
    depthwise: jax.Array,
    window: Window,
    moments: bool = False,
) -> jax.Array | list[jax.Array]:
    """`chansel_jax.ops.selection.channel_selection` in C++; all arrays are of one of `DTYPES`.

    Sums are taken in float32 where the dtype is bfloat16. Reverse-mode derivatives, once; neither
    `jax.jvp` nor second derivatives, and over an array that is sharded every device computes the
    whole: `chansel_jax.ops.late` adds what is missing. Under `jax.vmap` it runs once for each
    element. A window may need more memory than there is: a tile has as many columns as the padded
    image.

    With `moments` the output comes with mean and variance `(C_out,)` of its channels, and without
    any derivative; then the dtype is one of `EXACT_DTYPES`.

    Raises:
        ValueError: if the dtypes differ or are none of `DTYPES`, the window does not fit, or it is
            larger than any memory.
        RuntimeError: if the library is not available, or when it runs, if the shapes do not fit
            each other or memory is short.
        TypeError: under `jax.jvp`, and for second derivatives.
    """
    x, window = _canonical(x, (pointwise, depthwise), pointwise.shape, window)
    if moments:
        return _forward("chansel_forward", window, x, pointwise, depthwise, moments=True)
    return _channel_selection(window, x, pointwise, depthwise)


def dense_conv(
    x: jax.Array, kernel: jax.Array, window: Window, moments: bool = False
) -> jax.Array | list[jax.Array]:
    """`chansel_jax.ops.dense.dense_conv` in C++; all else as for `channel_selection`."""
    x, window = _canonical(x, (kernel,), kernel.shape[2:], window)
    if moments:
        return _forward("chansel_dense_forward", window, x, kernel, moments=True)
    return _dense_conv(window, x, kernel)


def moments(x: jax.Array) -> list[jax.Array]:
    """Mean and variance `(C,)` of the channels of `x` `(..., C)`, of one of `EXACT_DTYPES`."""
    _compiled()
    of_channels = jax.ShapeDtypeStruct(x.shape[-1:], x.dtype)
    return jax.ffi.ffi_call("chansel_moments", [of_channels, of_channels])(x)


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None = None,
    moments: Sequence[jax.Array] = (),
    *,
    relu: bool,
    epsilon: float,
) -> list[jax.Array]:
    """`chansel_jax.ops.norm.batch_norm` in C++, without any derivative.

    `scale`, `bias` and, if they are given, `moments` are of the dtype of the statistics, that of
    `x` one of `DTYPES`.
    """
    _compiled()
    results = [_like(x), _like(scale), _like(scale)]
    call = jax.ffi.ffi_call("chansel_norm_forward", results)
    residual = _nothing(x) if residual is None else residual
    known = moments or [_nothing(scale)] * 2
    return call(x, scale, bias, residual, *known, epsilon=np.float64(epsilon), relu=relu)


def batch_norm_gradients(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    y: jax.Array,
    mean: jax.Array,
    variance: jax.Array,
    dy: jax.Array,
    *,
    relu: bool,
    epsilon: float,
    residual: bool,
) -> list[jax.Array]:
    """The gradients of `batch_norm` by `x`, `scale`, `bias` and, if it has one, `residual`.

    Args:
        y: its output, `mean` and `variance` beside it.
        dy: the gradient by `y`.
        residual: whether it had one.
    """
    # The gradient by a residual without ReLU is dy, which is not copied.
    computed = residual and relu
    rectified = y if computed else _nothing(x)
    results = [_like(x), _like(scale), _like(scale), _like(x if computed else rectified)]
    *found, dresidual = jax.ffi.ffi_call("chansel_norm_backward", results)(
        *(x, scale, bias, rectified, mean, variance, dy), epsilon=np.float64(epsilon), relu=relu
    )
    return [*found, dresidual if relu else dy] if residual else found


def _nothing(x: jax.Array) -> jax.Array:
    return jnp.zeros(0, x.dtype)


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _canonical(
    x: jax.Array, kernels: tuple[jax.Array, ...], channels: Pair, window: Window
) -> tuple[jax.Array, Window]:
    """What of `x` is looked at, and the window with its padding as pairs.

    Raises:
        ValueError: if the dtypes or the window do not fit, or sizes in bytes might exceed 64 bits.
        RuntimeError: if the library is not available.
    """
    _compiled()
    dtypes = {str(array.dtype) for array in (x, *kernels)}
    if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
        raise ValueError(f"dtypes {sorted(dtypes)} of x and kernels must be one among {DTYPES}")
    size, kernel_size = x.shape[1:3], kernels[-1].shape[:2]
    window.output_size(size, kernel_size)  # raises where it does not fit
    pads = window.padding_pairs(size, kernel_size)
    padded = [pixels + sum(pad) for pixels, pad in zip(size, pads, strict=True)]
    if math.prod(padded) * max(channels) > MOST_NUMBERS:
        raise ValueError(
            f"padding={window.padding!r}: an image of {padded[0]} × {padded[1]} pixels, padded, "
            f"and {max(channels)} channels is more than any memory holds"
        )
    strides = tuple(map(min, window.strides, padded))  # farther steps find no second output either
    if kernel_size == (1, 1) and pads == ((0, 0), (0, 0)):
        # Only the pixels that are looked at, instead of sums over all.
        x, strides = x[:, :: strides[0], :: strides[1]], (1, 1)
    return x, window._replace(strides=strides, padding=pads)


def _once_differentiable(forward: Callable, gradients: Callable) -> Callable:
    """`forward(window, *operands)`, whose `gradients(window, *operands, dy)` have none."""

    def refuse(*_):
        raise TypeError(
            "lowering='native' has first derivatives only; for others take "
            "'grouped' or 'composed', of the dense convolution 'lax'"
        )

    function, gradients = (jax.custom_vjp(f, nondiff_argnums=(0,)) for f in (forward, gradients))
    gradients.defvjp(refuse, refuse)
    function.defvjp(
        lambda window, *operands: (function(window, *operands), operands),
        lambda window, operands, dy: gradients(window, *operands, dy),
    )
    return function


def _selection_gradients(window, *operands_and_dy):
    return tuple(_call("chansel_backward", window, operands_and_dy[:-1])(*operands_and_dy))


def _dense_gradients(window, x, kernel, dy):
    # Two calls, so that XLA leaves out the one whose result nobody asks for: a network's first
    # layer needs no gradient of the images.
    return (
        _call("chansel_dense_data_gradient", window, x)(kernel, dy),
        _call("chansel_dense_kernel_gradient", window, kernel)(x, dy),
    )


def _forward(
    name: str, window: Window, x: jax.Array, *kernels: jax.Array, moments: bool = False
) -> jax.Array | list[jax.Array]:
    *kernel_size, _, out_channels = kernels[-1].shape
    shape = (x.shape[0], *window.output_size(x.shape[1:3], kernel_size), out_channels)
    if moments and str(x.dtype) not in EXACT_DTYPES:
        raise ValueError(f"x of dtype {x.dtype} must be of one of {EXACT_DTYPES} with moments")
    y = jax.ShapeDtypeStruct(shape, x.dtype)
    moment = jax.ShapeDtypeStruct((out_channels if moments else 0,), x.dtype)
    found = _call(name, window, [y, moment, moment])(x, *kernels)
    return found if moments else found[0]


def _call(name: str, window: Window, like: Any) -> Callable:
    """The handler `name`, whose results have the shapes and dtypes of the tree `like`."""
    (top, _), (left, _) = window.padding
    results = jax.tree.map(_like, like)
    return functools.partial(
        jax.ffi.ffi_call(name, results, vmap_method="sequential"),
        strides=np.array(window.strides, np.int64),
        padding=np.array((top, left), np.int64),
        dilation=np.array(window.dilation, np.int64),
    )


_channel_selection = _once_differentiable(
    functools.partial(_forward, "chansel_forward"), _selection_gradients
)
_dense_conv = _once_differentiable(
    functools.partial(_forward, "chansel_dense_forward"), _dense_gradients
)


def _compiled() -> ctypes.CDLL:
    if not available():
        raise RuntimeError(f"lowering='native': {why_not()}")
    return _library()


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The library, its handlers registered with XLA; or why there is none."""
    most = os.environ.get(LIMIT) or INSTRUCTION_SETS[-1]
    if most not in INSTRUCTION_SETS:
        raise InstructionSetError(f"{LIMIT}={most!r} must be one of {INSTRUCTION_SETS}")
    path = Path(__file__).with_name("_handlers.so")
    if not path.exists():
        return "it was not compiled; install a C++ compiler, then install the package again"
    try:
        library = ctypes.CDLL(str(path))
        compiled_for, installed = library.ChanselApiVersion(), _installed_api_version()
    except (OSError, AttributeError) as error:
        return f"{path.name} is not of this machine or version, install the package again ({error})"
    if compiled_for > installed:
        # To register it all the same would keep JAX from finding the CPU.
        return (
            f"it was compiled for version 0.{compiled_for} of XLA's interface, jaxlib "
            f"{jaxlib.__version__} has 0.{installed}; install a later jaxlib, or the package again"
        )
    for name, handler in (
        ("chansel_forward", library.ChanselForward),
        ("chansel_backward", library.ChanselBackward),
        ("chansel_dense_forward", library.ChanselDenseForward),
        ("chansel_dense_data_gradient", library.ChanselDenseDataGradient),
        ("chansel_dense_kernel_gradient", library.ChanselDenseKernelGradient),
        ("chansel_moments", library.ChanselMoments),
        ("chansel_norm_forward", library.ChanselNormForward),
        ("chansel_norm_backward", library.ChanselNormBackward),
    ):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
    library.ChanselLimitInstructionSet(INSTRUCTION_SETS.index(most))
    return library


def _installed_api_version() -> int:
    """The minor version of XLA's foreign function interface, from the headers of jaxlib."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    return int(re.search(r"#define XLA_FFI_API_MINOR (\d+)", header)[1])
