"""The geometry of a window in any number of dimensions: strides, padding and dilations.

Every argument is brought into one canonical form here, so that layers, lowerings and closed forms
all accept the same spellings and refuse the same mistakes in the same words.
"""

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Pair = tuple[int, int]
Sizes = tuple[int, ...]  # one for each spatial axis
Padding = str | int | Sequence[int | Sequence[int]]
PaddingPairs = tuple[Pair, ...]

PADDINGS_OF_LAX = ("SAME", "SAME_LOWER", "VALID")
PADDED_FIRST = {"CIRCULAR": "wrap", "REFLECT": "reflect", "CAUSAL": "constant"}
"""Paddings that `lax` does not have, and the mode of `jnp.pad` that makes them."""


def positive(name: str, value: int) -> int:
    """`value` if it is an integer of at least 1; otherwise `ValueError` naming the argument."""
    if not is_int(value) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    return int(value)


def share_of_all(name: str, value: float) -> float:
    """`value` if it is a number in (0, 1]; otherwise `ValueError` naming the argument."""
    if not isinstance(value, numbers.Real) or not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} must be in (0, 1]")
    return value


def per_axis(name: str, value: int | Sequence[int], dimensions: int = 2) -> Sizes:
    """`value` for each spatial axis: an integer stands for all, a sequence has one for each.

    Raises:
        ValueError: if it is neither, or if one of them is below 1.
    """
    values = (value,) * dimensions if is_int(value) else _sequence(value)
    if len(values) != dimensions or not all(is_int(v) and v >= 1 for v in values):
        several = "a pair of them" if dimensions == 2 else f"a sequence of {dimensions}"
        raise ValueError(f"{name}={value!r} must be an integer of at least 1 or {several}")
    return tuple(map(int, values))


def kernel_sizes(kernel_size: int | Sequence[int]) -> Sizes:
    """`kernel_size` as a tuple, whose length is the number of dimensions; an integer means one.

    Raises:
        ValueError: if it is neither, or if one of them is below 1.
    """
    values = _sequence(kernel_size)
    if not values or not all(is_int(v) and v >= 1 for v in values):
        raise ValueError(
            f"kernel_size={kernel_size!r} must be an integer of at least 1, for one dimension, or "
            "a sequence with one for each dimension, as (3, 3) for images"
        )
    return tuple(map(int, values))


def padding_spec(padding: Padding, dimensions: int = 2) -> str | PaddingPairs:
    """`padding` as a name in capitals, or as a pair `(before, after)` for each spatial axis.

    The names are `"SAME"`, `"SAME_LOWER"`, `"VALID"`, `"CIRCULAR"`, `"REFLECT"` and, in one
    dimension, `"CAUSAL"`, in any case. An integer pads all sides, a sequence of integers each axis
    on both its sides; what is negative takes pixels off.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(padding, str):
        name = padding.upper()
        if name == "CAUSAL" and dimensions != 1:
            raise ValueError(f"padding={padding!r} is for one dimension only, not {dimensions}")
        if name in (*PADDINGS_OF_LAX, *PADDED_FIRST):
            return name
    elif is_int(padding):
        return ((int(padding), int(padding)),) * dimensions
    else:
        sides = [(p, p) if is_int(p) else _sequence(p) for p in _sequence(padding)]
        if len(sides) == dimensions and all(len(s) == 2 and all(map(is_int, s)) for s in sides):
            return tuple((int(before), int(after)) for before, after in sides)
    names = ", ".join(map(repr, (*PADDINGS_OF_LAX, *PADDED_FIRST)))
    raise ValueError(
        f"padding={padding!r} must be one of {names}, an integer, or a sequence of {dimensions}, "
        "each an integer or a pair (before, after)"
    )


class Window(NamedTuple):
    """How a kernel moves over its input: parsed once by `Window.of`, then handed on whole.

    Attributes:
        strides: steps between outputs along each spatial axis.
        padding: a name in capitals, or a pair `(before, after)` for each axis.
        dilation: distance between a kernel's elements along each axis.
        input_dilation: distance between the input's elements, with zeros in between, likewise.
    """

    strides: Sizes
    padding: str | PaddingPairs
    dilation: Sizes
    input_dilation: Sizes

    @classmethod
    def of(
        cls,
        strides: int | Sequence[int] | None = 1,
        padding: Padding = "SAME",
        dilation: int | Sequence[int] | None = 1,
        input_dilation: int | Sequence[int] | None = 1,
        *,
        dimensions: int = 2,
        dilation_name: str = "dilation",
    ) -> "Window":
        """The window of arguments in any spelling that `per_axis` and `padding_spec` take.

        None stands for 1. `dilation_name` is what errors call `dilation`.

        Raises:
            ValueError: naming the argument that is wrong, and its value.
        """

        def sizes(name, value):
            return per_axis(name, 1 if value is None else value, dimensions)

        window = cls(
            sizes("strides", strides),
            padding_spec(padding, dimensions),
            sizes(dilation_name, dilation),
            sizes("input_dilation", input_dilation),
        )
        if isinstance(window.padding, str) and set(window.input_dilation) != {1}:
            raise ValueError(
                f"padding={padding!r} must be in integers where input_dilation={input_dilation!r}"
            )
        return window

    @property
    def dimensions(self) -> int:
        """The number of spatial axes."""
        return len(self.strides)

    def padding_pairs(self, size: Sizes, kernel_size: Sizes) -> PaddingPairs:
        """The padding as pairs `(before, after)` for an input whose spatial axes have `size`."""
        if not isinstance(self.padding, str):
            return self.padding
        extent = self._extent(kernel_size)
        if self.padding == "CAUSAL":
            return tuple((e - 1, 0) for e in extent)
        if self.padding in PADDED_FIRST:
            return tuple(((e - 1) // 2, e // 2) for e in extent)
        pads = lax.padtype_to_pads(size, extent, self.strides, self.padding)
        return tuple(map(tuple, pads))

    def output_size(self, size: Sizes, kernel_size: Sizes) -> Sizes:
        """The spatial axes of the output for an input whose spatial axes have `size`.

        In a program that is exported a size may be symbolic.

        Raises:
            ValueError: if the padded input is smaller than the dilated kernel.
        """
        pads, extent = self.padding_pairs(size, kernel_size), self._extent(kernel_size)
        dilated = ((n - 1) * d + 1 for n, d in zip(size, self.input_dilation, strict=True))
        output = tuple(
            ((max(0, n) if is_int(n) else n) + sum(p) - e) // s + 1
            for n, p, e, s in zip(dilated, pads, extent, self.strides, strict=True)
        )
        if any(is_int(n) and n < 1 for n in output):
            raise ValueError(
                f"an input of size ({axis_names(len(size))})={tuple(size)} with "
                f"padding={self.padding!r} is smaller than a kernel of "
                f"kernel_size={tuple(kernel_size)}, dilated by {self.dilation}"
            )
        return output

    def padded_first(self, x: jax.Array, kernel_size: Sizes) -> tuple[jax.Array, "Window"]:
        """`x` with a padding of `PADDED_FIRST` around it, and the window that is left to do.

        Both stay as they are where the padding is another.
        """
        if self.padding not in PADDED_FIRST:
            return x, self
        pads = ((0, 0), *self.padding_pairs(x.shape[1:-1], kernel_size), (0, 0))
        return jnp.pad(x, pads, PADDED_FIRST[self.padding]), self._replace(padding="VALID")

    def with_rows(self) -> "Window":
        """A one-dimensional window in two dimensions, for an input and a kernel of one row."""
        padding = self.padding if isinstance(self.padding, str) else ((0, 0), *self.padding)
        strides, dilation, input_dilation = (
            (1, *sizes) for sizes in (self.strides, self.dilation, self.input_dilation)
        )
        return Window(strides, padding, dilation, input_dilation)

    def _extent(self, kernel_size: Sizes) -> Sizes:
        """What the dilated kernel spans."""
        return tuple((k - 1) * d + 1 for k, d in zip(kernel_size, self.dilation, strict=True))


def axis_names(dimensions: int) -> str:
    """What messages call the spatial axes, as in `"H, W"`."""
    named = {1: "L", 2: "H, W", 3: "D, H, W"}
    return named.get(dimensions) or ", ".join(f"S_{i + 1}" for i in range(dimensions))


def is_int(value: object) -> bool:
    """Whether `value` is an integer of Python or NumPy, and neither a truth value nor an array."""
    arrays = np.ndarray | jax.Array
    return hasattr(value, "__index__") and not isinstance(value, bool | arrays)


def _sequence(value: object) -> Sequence:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(value) if isinstance(value, tuple | list) else (value,)
