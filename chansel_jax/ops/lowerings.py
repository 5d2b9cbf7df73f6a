"""Which lowering is the fastest, where: what `lowering="auto"` chooses.

The measurements behind these rules are tables of `chansel_jax/README.md`, section 'What `auto`
takes'; `python -m experiments.tune` measures again on the machine at hand.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.typing import DTypeLike

from chansel_jax.ops import native

BY_XLA = ("lax", "composed", "grouped", "shifted")  # from what takes most work on to what least
NATIVE = ("native", "composed_native")  # in C++
NAMES = ("auto", *BY_XLA)

# Weights of the pointwise part from which on the matrix products decide, where XLA is the faster,
# by instruction set.
WIDE = {"avx512": 256 * 256, "avx2": 128 * 128, "baseline": 0}
# Pairs of channels up to which the dense convolution in C++ is the faster; vectors of 16 bytes gain
# nothing.
DENSE = {"avx512": 256 * 256, "avx2": 128 * 128, "baseline": 0}


class Place(NamedTuple):
    """Where a program runs.

    Attributes:
        platform: `"cpu"`, None for all others, or `"any"` for what every platform and every
            derivative has.
        calls: whether the program may call what is in C++.
    """

    platform: str | None
    calls: bool


ANYWHERE = Place("any", False)


def here() -> Place:
    """Where a program runs that takes this process's devices."""
    platform = "cpu" if jax.default_backend() == "cpu" else None
    return Place(platform, platform == "cpu")


_DEFINITION = "definition"
_asked_for = jax.make_user_context("auto")  # part of what jax.jit keeps a program by


@contextlib.contextmanager
def lowering(name: str) -> Iterator[None]:
    """Has all layers that were made with `lowering="auto"` take the lowering `name`, in a `with`.

        with chansel_jax.lowering("composed"):
            flops = jax.jit(network).lower(x).cost_analysis()["flops"]

    Layers that do not have it take what is nearest: the dense convolution `"lax"`, channel
    selection `"composed"` for `"lax"`, with `norm` `"grouped"`. Where a layer asks for what the
    lowering lacks, as a negative padding, it stays with `"auto"`.

    Args:
        name: `"lax"`, `"composed"`, `"grouped"`, `"shifted"` or `"auto"`. What is in C++ depends on
            dtypes and machine, and is what `"auto"` takes where it gains.

    Raises:
        ValueError: if it is none.
    """
    if name not in NAMES:
        raise ValueError(f"name={name!r} must be one of {', '.join(map(repr, NAMES))}")
    with _asked_for(_DEFINITION if _asked_for.value == _DEFINITION else name):
        yield


def by_definition() -> contextlib.AbstractContextManager:
    """Has all layers, in a `with`, take the lowering that computes what defines them, part by part.

    That is the convolution of `lax`, and for channel selection the pointwise part and the depthwise
    one, whatever lowering they ask for. It is for counting, where nothing is run.
    """
    return _asked_for(_DEFINITION)


def defining(choices: tuple[str, ...]) -> str | None:
    """The lowering among `choices` that `by_definition` asks for; None if nothing does."""
    if _asked_for.value != _DEFINITION:
        return None
    return "lax" if "lax" in choices else "grouped"


def nearest_asked_for(choices: tuple[str, ...]) -> str:
    """What `lowering` asks for, or the nearest to it among `choices`, which may be `"auto"`."""
    name = _asked_for.value
    if name in choices:
        return name
    return next((each for each in BY_XLA if each in choices), "auto") if name in BY_XLA else "auto"


def fastest_layer(place: Place, x: jax.Array, depthwise: jax.Array) -> str:
    """The lowering that `channel_selection` takes for `"auto"`.

    Args:
        place: where the program runs.
        x: `(N, *spatial, C_in)`; of both, only shape and dtype count.
        depthwise: `(*kernel_size, R, C_out)`.
    """
    if place.platform != "cpu":
        return "composed"  # 1.04 to 1.09 times the dense step on an H100; others not measured yet
    if _symbolic(x):
        return "composed"
    if not _native_runs(place, x.dtype):
        return "shifted"
    in_channels, (rank, out_channels) = x.shape[-1], depthwise.shape[-2:]
    if rank > max(2, in_channels // 16) and _dense_gains(place, x.dtype, in_channels, out_channels):
        return "composed_native"  # its work does not grow with the rank
    narrow = in_channels * out_channels * rank < WIDE[native.instruction_set()]
    return "native" if narrow else "shifted"


def fastest_depthwise(place: Place, x: jax.Array) -> str:
    """The lowering that `depthwise_conv` takes for `"auto"`, of images `(N, *spatial, C)`."""
    # Other backends have kernels for grouped convolutions; what they take was not measured yet.
    return "shifted" if place.platform == "cpu" and not _symbolic(x) else "grouped"


def _symbolic(x: jax.Array) -> bool:
    """Whether the program is to be exported for images `x` of any size.

    What cuts them up would have JAX compare expressions of their sizes, which after a few layers
    takes minutes.
    """
    return not all(isinstance(size, int) for size in x.shape[1:-1])


def fastest_dense(place: Place, kernel: jax.Array) -> str:
    """The lowering that `dense_conv` takes for `"auto"`.

    Args:
        place: where the program runs.
        kernel: `(*kernel_size, C_in, C_out)`, of the dtype of the input; its values do not count.
    """
    return "native" if _dense_gains(place, kernel.dtype, *kernel.shape[-2:]) else "lax"


def _native_runs(place: Place, dtype: DTypeLike) -> bool:
    """Whether what is in C++ can run there."""
    return place.calls and str(dtype) in native.DTYPES and native.available()


def _dense_gains(place: Place, dtype: DTypeLike, in_channels: int, out_channels: int) -> bool:
    """Whether the dense convolution in C++ can run there, and was measured to be the faster."""
    return (
        _native_runs(place, dtype)
        and str(dtype) == "float32"
        and in_channels * out_channels <= DENSE[native.instruction_set()]
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
