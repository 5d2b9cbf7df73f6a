"""Channel selection in C++ for CPUs: pointwise and depthwise fused in cache.

A small library of XLA custom calls, compiled when the package is installed where a C++ compiler is
at hand. Each image's weighted sums stay in cache: forward reads the input and writes the output
once, backward computes the sums anew instead of keeping them. Gradients are the same bit for bit
for any number of threads.
"""

import ctypes
import functools
import importlib.machinery
from pathlib import Path

import jax
import numpy as np

from chansel_jax.window import Padding, output_size, padding_pairs, pair

DTYPES = ("float32", "float64", "bfloat16")
INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
MISSING = "it was not compiled; install a C++ compiler, then install the package again"


def available() -> bool:
    """Whether the library was compiled when the package was installed."""
    return _library() is not None


def limit_instruction_set(most: str = INSTRUCTION_SETS[-1]) -> str:
    """Computes with no instruction set beyond `most`; returns the one that is used from now on.

    The best that the processor has is taken by itself; this is for comparing them.

    Raises:
        ValueError: if `most` is none of `INSTRUCTION_SETS`.
        RuntimeError: if the library was not compiled.
    """
    if most not in INSTRUCTION_SETS:
        raise ValueError(f"most={most!r} must be one of {INSTRUCTION_SETS}")
    number = INSTRUCTION_SETS.index(most)
    return INSTRUCTION_SETS[_compiled().ChanselLimitInstructionSet(number)]


def channel_selection(
    x: jax.Array,
    pointwise: jax.Array,
    depthwise: jax.Array,
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "SAME",
    dilation: int | tuple[int, int] = 1,
) -> jax.Array:
    """`chansel_jax.selection.channel_selection` in C++, on CPUs.

    Sums are taken in float32 where the dtype is bfloat16. Reverse-mode derivatives, once; neither
    `jax.jvp` nor second derivatives. Under `jax.vmap` it runs once for each element; over an array
    that is sharded, every device computes the whole (put it into `jax.shard_map`).

    Args:
        x: `(N, H, W, C_in)`, of a dtype among `DTYPES`.
        pointwise: `(C_in, C_out·R)`, of the dtype of `x`.
        depthwise: `(K_h, K_w, R, C_out)`, of the dtype of `x`.
        strides: steps between outputs in rows and columns. Default 1.
        padding: as `chansel_jax.window.padding_spec` has it. Default `"SAME"`.
        dilation: distance between a kernel's elements. Default 1.

    Returns:
        `(N, H_out, W_out, C_out)`, of the dtype of `x`.

    Raises:
        ValueError: if the dtypes differ or are none of `DTYPES`, or the window does not fit.
        RuntimeError: if the library was not compiled.
        TypeError: from JAX, under `jax.jvp`.
    """
    _compiled()
    dtypes = {str(array.dtype) for array in (x, pointwise, depthwise)}
    if len(dtypes) > 1 or not dtypes.issubset(DTYPES):
        raise ValueError(
            f"dtypes {sorted(dtypes)} of x, pointwise and depthwise must be one among {DTYPES}"
        )
    strides, dilation = pair("strides", strides), pair("dilation", dilation)
    size, kernel_size = x.shape[1:3], depthwise.shape[:2]
    pads = padding_pairs(padding, size, kernel_size, strides, dilation)
    output_size(size, kernel_size, strides, padding, dilation)  # raises where it does not fit
    if kernel_size == (1, 1) and pads == ((0, 0), (0, 0)):
        # Only the pixels that are looked at, instead of sums over all.
        x, strides = x[:, :: strides[0], :: strides[1]], (1, 1)
    return _channel_selection(x, pointwise, depthwise, (strides, pads, dilation))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _channel_selection(x, pointwise, depthwise, window):
    strides, pads, dilation = window
    size = output_size(x.shape[1:3], depthwise.shape[:2], strides, pads, dilation)
    shape = (x.shape[0], *size, depthwise.shape[3])
    call = jax.ffi.ffi_call(
        "chansel_forward", jax.ShapeDtypeStruct(shape, x.dtype), vmap_method="sequential"
    )
    return call(x, pointwise, depthwise, **_attributes(window))


def _forward(x, pointwise, depthwise, window):
    return _channel_selection(x, pointwise, depthwise, window), (x, pointwise, depthwise)


def _backward(window, operands, gradient):
    call = jax.ffi.ffi_call(
        "chansel_backward",
        [jax.ShapeDtypeStruct(operand.shape, operand.dtype) for operand in operands],
        vmap_method="sequential",
    )
    return tuple(call(*operands, gradient, **_attributes(window)))


_channel_selection.defvjp(_forward, _backward)


def _attributes(window) -> dict[str, np.ndarray]:
    strides, ((top, _), (left, _)), dilation = window
    return {
        "strides": np.array(strides, np.int64),
        "padding": np.array((top, left), np.int64),
        "dilation": np.array(dilation, np.int64),
    }


def _compiled() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise RuntimeError(f"lowering='native': {MISSING}")
    return library


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The library, its handlers registered with XLA; None where it was not compiled."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = Path(__file__).with_name("_handlers" + suffix)
        if path.exists():
            library = ctypes.CDLL(str(path))
            for name, handler in (
                ("chansel_forward", library.ChanselForward),
                ("chansel_backward", library.ChanselBackward),
            ):
                jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler), platform="cpu")
            return library
    return None
