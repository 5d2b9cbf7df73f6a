"""Which lowering is the fastest, where: what `lowering="auto"` chooses.

The measurements behind these rules are tables of `chansel_jax/README.md`, section 'What `auto`
takes'; `python -m experiments.tune` measures again on the machine at hand.
"""

import jax
from jax.typing import DTypeLike

from chansel_jax.ops import native

NATIVE = ("native", "composed_native")  # in C++

# Weights of the pointwise part from which on the matrix products decide, where XLA is the faster,
# by instruction set.
WIDE = {"avx512": 256 * 256, "avx2": 64 * 64, "baseline": 0}


def fastest_layer(x: jax.Array, depthwise: jax.Array) -> str:
    """The lowering that `channel_selection` takes for `"auto"`.

    Args:
        x: `(N, H, W, C_in)`; of both, only shape and dtype count.
        depthwise: `(K_h, K_w, R, C_out)`.
    """
    if jax.default_backend() != "cpu":
        return "composed"  # 1.04 to 1.09 times the dense step on an H100; others not measured yet
    if not _native_runs(x.dtype):
        return "shifted"
    in_channels, (rank, out_channels) = x.shape[3], depthwise.shape[2:]
    if rank > max(2, in_channels // 16) and _dense_gains(x.dtype, in_channels, out_channels):
        return "composed_native"  # its work does not grow with the rank
    narrow = in_channels * out_channels * rank < WIDE[native.instruction_set()]
    return "native" if narrow else "shifted"


def fastest_depthwise() -> str:
    """The lowering that `depthwise_conv` takes for `"auto"`."""
    # Other backends have kernels for grouped convolutions; what they take was not measured yet.
    return "shifted" if jax.default_backend() == "cpu" else "grouped"


def fastest_dense(kernel: jax.Array) -> str:
    """The lowering that `dense_conv` takes for `"auto"`.

    Args:
        kernel: `(K_h, K_w, C_in, C_out)`, of the dtype of the input; its values do not count.
    """
    return "native" if _dense_gains(kernel.dtype, *kernel.shape[2:]) else "lax"


def _native_runs(dtype: DTypeLike) -> bool:
    """Whether what is in C++ can run here, on one device: XLA cannot split it over several."""
    return (
        jax.default_backend() == "cpu"
        and jax.device_count() == 1
        and str(dtype) in native.DTYPES
        and native.available()
    )


def _dense_gains(dtype: DTypeLike, in_channels: int, out_channels: int) -> bool:
    """Whether the dense convolution in C++ can run here, and was measured to be the faster."""
    return (
        _native_runs(dtype)
        and str(dtype) == "float32"
        and in_channels * out_channels <= 128 * 128
        and native.instruction_set() != "baseline"  # whose vectors of 16 bytes gain nothing
    )


def checked_lowering(lowering: str, choices: tuple[str, ...]) -> str:
    """`lowering` if it is one of `choices` and can run here.

    Raises:
        ValueError: if not, naming the choices or what is missing.
    """
    if lowering not in choices:
        names = ", ".join(map(repr, choices))
        raise ValueError(f"lowering={lowering!r} must be one of {names}")
    if lowering in NATIVE and not native.available():
        raise ValueError(f"lowering={lowering!r}: {native.why_not()}")
    return lowering


def runnable(choices: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `choices` that can run here; without those in C++, if they are not there."""
    native_runs = jax.default_backend() == "cpu" and native.available()
    return tuple(choice for choice in choices if choice not in NATIVE or native_runs)
