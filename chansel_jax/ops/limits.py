"""What a convolution may ask for beside its window, and which lowerings have it."""

from typing import Any, NamedTuple

from flax.typing import PrecisionLike
from jax.typing import DTypeLike

from chansel_jax.ops.lowerings import checked_lowering, defining, nearest_asked_for
from chansel_jax.ops.window import Window

OF_LAX = ("lax", "composed", "grouped")
"""Lowerings that are convolutions of `jax.lax`, and so have all that it has."""


class Options(NamedTuple):
    """What `jax.lax.conv_general_dilated` takes beside its arrays and the window.

    Attributes:
        groups: `feature_group_count`: input and output channels in so many groups.
        precision: `jax.lax.Precision` of the products.
        preferred_element_type: dtype of the output; None is that of the input.
        out_sharding: sharding of the output, under a mesh of explicit axes.
    """

    groups: int = 1
    precision: PrecisionLike = None
    preferred_element_type: DTypeLike | None = None
    out_sharding: Any = None


DEFAULT = Options()


def lacks(lowering: str, window: Window, options: Options = DEFAULT) -> str | None:
    """What of `window` and `options` `lowering` does not have; None if it has everything.

    A one-dimensional window is one of two dimensions with a single row.
    """
    if lowering in ("auto", *OF_LAX):
        return None
    if window.dimensions > 2:
        return f"{window.dimensions} spatial axes"
    if set(window.input_dilation) != {1}:
        return f"input_dilation={window.input_dilation}"
    if not isinstance(window.padding, str) and min(map(min, window.padding)) < 0:
        return f"negative padding={window.padding}"
    if options.groups > 1 and lowering != "shifted":
        return f"feature_group_count={options.groups}"
    if options.preferred_element_type is not None:
        return f"preferred_element_type={options.preferred_element_type!r}"
    if options.out_sharding is not None:
        return f"out_sharding={options.out_sharding!r}"
    return None


def able(
    lowering: str, choices: tuple[str, ...], window: Window, options: Options = DEFAULT
) -> str:
    """`lowering` if it is one of `choices`, can run here and lacks nothing.

    For `"auto"` it is what `chansel_jax.lowering` asks for, if anything does and that is able.

    Raises:
        ValueError: if not, naming the choices or what is missing.
    """
    missing = lacks(checked_lowering(lowering, choices), window, options)
    if missing is not None:
        raise ValueError(
            f"lowering={lowering!r} does not have {missing}; 'auto' finds one that has"
        )
    if defined := defining(choices):
        return defined
    if lowering != "auto":
        return lowering
    wished = nearest_asked_for(choices)
    return wished if lacks(wished, window, options) is None else "auto"


def first_able(lowerings: tuple[str, ...], window: Window, options: Options = DEFAULT) -> str:
    """The first of `lowerings` that lacks nothing; the last one must be of `OF_LAX`."""
    return next(name for name in lowerings if lacks(name, window, options) is None)
