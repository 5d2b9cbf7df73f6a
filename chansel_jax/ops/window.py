"""The geometry of a two-dimensional window: strides, padding and dilation.

Every argument is brought into one canonical form here, so that layers, lowerings and closed forms
all accept the same spellings and refuse the same mistakes in the same words.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jax import lax

Pair = tuple[int, int]
Padding = str | int | Sequence[int | Sequence[int]]
PaddingPairs = tuple[Pair, Pair]


def positive(name: str, value: int) -> int:
    """`value` if it is an integer of at least 1; otherwise `ValueError` naming the argument."""
    if not _is_int(value) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer of at least 1")
    return int(value)


def pair(name: str, value: int | Sequence[int]) -> Pair:
    """`value` for rows and columns: an integer stands for both, a sequence of two for each.

    Raises:
        ValueError: if it is neither, or if one of the two is below 1.
    """
    values = (value, value) if _is_int(value) else tuple(_sequence(value))
    if len(values) != 2 or not all(_is_int(v) and v >= 1 for v in values):
        raise ValueError(f"{name}={value!r} must be an integer of at least 1 or a pair of them")
    return int(values[0]), int(values[1])


def padding_spec(padding: Padding) -> str | PaddingPairs:
    """`padding` as `"SAME"`, `"VALID"` or `((top, bottom), (left, right))`.

    An integer pads all four sides, a pair of integers rows and columns on both their sides.

    Raises:
        ValueError: if it is none of these, or if a number is negative.
    """
    if isinstance(padding, str):
        if padding in ("SAME", "VALID"):
            return padding
    elif _is_int(padding):
        if padding >= 0:
            return ((int(padding), int(padding)),) * 2
    else:
        sides = [(p, p) if _is_int(p) else tuple(_sequence(p)) for p in _sequence(padding)]
        if len(sides) == 2 and all(len(s) == 2 and all(_is_int(v) for v in s) for s in sides):
            (top, bottom), (left, right) = sides
            if min(top, bottom, left, right) >= 0:
                return (int(top), int(bottom)), (int(left), int(right))
    raise ValueError(
        f"padding={padding!r} must be 'SAME', 'VALID', an integer of at least 0, or two of "
        "(rows, columns), each an integer or a pair (before, after)"
    )


class Window(NamedTuple):
    """How a kernel moves over an image: parsed once by `Window.of`, then handed on whole.

    Attributes:
        strides: steps between outputs in rows and columns.
        padding: `"SAME"`, `"VALID"` or `((top, bottom), (left, right))`.
        dilation: distance between a kernel's elements in rows and columns.
    """

    strides: Pair
    padding: str | PaddingPairs
    dilation: Pair

    @classmethod
    def of(
        cls,
        strides: int | Sequence[int] = 1,
        padding: Padding = "SAME",
        dilation: int | Sequence[int] = 1,
    ) -> "Window":
        """The window of arguments in any spelling that `pair` and `padding_spec` take.

        Raises:
            ValueError: naming the argument that is wrong, and its value.
        """
        return cls(pair("strides", strides), padding_spec(padding), pair("dilation", dilation))

    def padding_pairs(self, size: Pair, kernel_size: Pair) -> PaddingPairs:
        """The padding as `((top, bottom), (left, right))` for an input of `size` (H, W)."""
        if not isinstance(self.padding, str):
            return self.padding
        extent = self._extent(kernel_size)
        (top, bottom), (left, right) = lax.padtype_to_pads(size, extent, self.strides, self.padding)
        return (int(top), int(bottom)), (int(left), int(right))

    def output_size(self, size: Pair, kernel_size: Pair) -> Pair:
        """Height and width of the output for an input of `size` (H, W).

        Raises:
            ValueError: if the padded input is smaller than the dilated kernel.
        """
        pads, extent = self.padding_pairs(size, kernel_size), self._extent(kernel_size)
        rows, columns = (
            (n + sum(p) - e) // s + 1
            for n, p, e, s in zip(size, pads, extent, self.strides, strict=True)
        )
        if rows < 1 or columns < 1:
            raise ValueError(
                f"an input of size (H, W)={tuple(size)} with padding={self.padding!r} is smaller "
                f"than a kernel of kernel_size={kernel_size} at dilation={self.dilation}"
            )
        return rows, columns

    def _extent(self, kernel_size: Pair) -> Pair:
        """Rows and columns that the dilated kernel spans."""
        return tuple((k - 1) * d + 1 for k, d in zip(kernel_size, self.dilation, strict=True))


def _is_int(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _sequence(value: object) -> Sequence:
    return value if isinstance(value, (tuple, list)) else (value,)
