"""The depthwise convolution as shifted multiply-adds: no `lax` convolution, forward or backward.

On CPUs XLA computes grouped convolutions and their gradients slowly, and any convolution's gradient
inside a loop body very slowly. Sums of shifted arrays times kernel elements have neither trouble.

How the arrays lie. The input is padded once and split into *phases*, the rows and columns that are
equal modulo the strides, so that a tap (one kernel element) reads one contiguous box of one phase,
whatever stride and dilation. W and C are merged into one axis, on which a step of one column is a
step of C: long contiguous rows are what XLA vectorises well. Input channels are split by rank
before (they lie interleaved), so that everything here has as many channels as the output.

`lax.optimization_barrier` stands wherever an array is read by every tap: without it XLA fuses what
computes the array into each tap and computes it as often as there are taps.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from chansel_jax.ops.late import varying_alike
from chansel_jax.ops.window import Pair, Window

# The kernel gradient sums so many rows at most, for so many taps at most, in one loop. LLVM unrolls
# a loop of 72 or 96 products and makes vector code of the one around it; at 144 products and more
# it stays scalar. Fewer rows at once mean more passes over memory.
_BLOCK_ROWS = 8
_BLOCK_TAPS = 9

Phase = Pair
Shift = Pair


class _Geometry(NamedTuple):
    """The geometry, as static data; every pair is (rows, columns)."""

    size: Pair  # H, W of the input
    before: Pair  # padding above and on the left
    strides: Pair
    taps: tuple[tuple[Phase, Shift], ...]  # which phase a tap reads, and from where on
    reach: Shift  # the largest shift
    out: Pair  # H, W of the output
    block: int  # rows that the kernel gradient sums at once
    rows: int  # rows of the output, rounded up to whole blocks
    extent: Pair  # rows and columns of a phase: as many as all taps together read


def _geometry(size: Pair, kernel_size: Pair, window: Window) -> _Geometry:
    pads, out = window.padding_pairs(size, kernel_size), window.output_size(size, kernel_size)
    taps = []
    for i, j in itertools.product(*map(range, kernel_size)):
        (row_shift, row_phase) = divmod(i * window.dilation[0], window.strides[0])
        (column_shift, column_phase) = divmod(j * window.dilation[1], window.strides[1])
        taps.append(((row_phase, column_phase), (row_shift, column_shift)))
    reach = tuple(max(shift[axis] for _, shift in taps) for axis in (0, 1))
    blocks = -(-out[0] // _BLOCK_ROWS)
    block = -(-out[0] // blocks)
    return _Geometry(
        size=size,
        before=(pads[0][0], pads[1][0]),
        strides=window.strides,
        taps=tuple(taps),
        reach=reach,
        out=out,
        block=block,
        rows=blocks * block,
        extent=(reach[0] + blocks * block, reach[1] + out[1]),
    )


def depthwise_shifted(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """`depthwise_conv` of checked arguments."""
    x, kernel = varying_alike(x, kernel)
    return _conv(x, kernel, _geometry(x.shape[1:3], kernel.shape[:2], window))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _conv(x: jax.Array, kernel: jax.Array, geometry: _Geometry) -> jax.Array:
    return _conv_fwd(x, kernel, geometry)[0]


def _conv_fwd(x, kernel, geometry):
    rank, channels = kernel.shape[2:]
    by_rank = x.reshape(*x.shape[:3], channels, rank)
    # The phases are kept for the backward pass instead of `x`: it need not compute them again.
    phases = [_split(by_rank[..., r], geometry) for r in range(rank)]
    y = _forward(phases, _taps(kernel), geometry)
    return y.astype(x.dtype).reshape(x.shape[0], *geometry.out, channels), (phases, kernel)


def _conv_bwd(geometry, residuals, dy):
    phases, kernel = residuals
    rank, channels = kernel.shape[2:]
    dy = _padded_gradient(dy, geometry)
    taps = _taps(kernel)
    dx = jnp.stack(
        [_data_gradient(dy, taps[:, r], geometry).astype(dy.dtype) for r in range(rank)], axis=-1
    )
    dkernel = jnp.stack([_kernel_gradient(p, dy, channels, geometry) for p in phases], axis=1)
    return (
        dx.reshape(dx.shape[0], *geometry.size, channels * rank),
        dkernel.reshape(kernel.shape).astype(kernel.dtype),
    )


_conv.defvjp(_conv_fwd, _conv_bwd)


def _split(x: jax.Array, geometry: _Geometry) -> dict[Phase, jax.Array]:
    """The phases of `x` `(N, H, W, C)` that a tap reads, padded, each `(N, *extent)` of W·C."""
    n, *size, channels = x.shape
    (step_h, step_w), (rows, columns) = geometry.strides, geometry.extent
    # What no tap reads is cut off: such a padding is negative.
    pads = [
        (before, count * step - before - length, 0)
        for before, count, step, length in zip(
            geometry.before, geometry.extent, geometry.strides, size, strict=True
        )
    ]
    x = lax.pad(x, _zero(x), ((0, 0, 0), *pads, (0, 0, 0)))
    x = x.reshape(n, rows, step_h, columns, step_w * channels)
    phases = {}
    for i, j in sorted({phase for phase, _ in geometry.taps}):
        phase = x[:, :, i, :, j * channels : (j + 1) * channels]
        phases[i, j] = phase.reshape(n, rows, columns * channels)
    return lax.optimization_barrier(phases)


def _forward(
    phases: list[dict[Phase, jax.Array]], taps: jax.Array, geometry: _Geometry
) -> jax.Array:
    """The output `(N, H_out, W_out·C)` of the phases of each rank and `taps` `(T, R, C)`."""
    channels = taps.shape[2]
    h, w = geometry.out
    y = None
    for r, by_phase in enumerate(phases):
        for t, (phase, shift) in enumerate(geometry.taps):
            box = _box(by_phase[phase], shift, (h, w), channels)
            y = _add(y, box * _along_row(taps[t, r], w))
    return y


def _padded_gradient(dy: jax.Array, geometry: _Geometry) -> jax.Array:
    """`dy` as rows of W·C in a frame of zeros as wide as the taps reach."""
    n, h, w, channels = dy.shape
    (up, left), (rows, columns) = geometry.reach, geometry.extent
    pads = ((0, 0, 0), (up, rows - h, 0), (left * channels, (columns - w) * channels, 0))
    return lax.optimization_barrier(lax.pad(dy.reshape(n, h, w * channels), _zero(dy), pads))


def _data_gradient(dy: jax.Array, taps: jax.Array, geometry: _Geometry) -> jax.Array:
    """The gradient `(N, H, W, C)` by one rank's input, of the padded `dy` and `taps` `(T, C)`."""
    n, channels = dy.shape[0], taps.shape[1]
    dx = None
    for phase in sorted({phase for phase, _ in geometry.taps}):
        part = None
        for t, (of, shift) in enumerate(geometry.taps):
            if of == phase:
                start = (geometry.reach[0] - shift[0], geometry.reach[1] - shift[1])
                box = _box(dy, start, geometry.extent, channels)
                part = _add(part, box * _along_row(taps[t], geometry.extent[1]))
        # Back where it came from: rows and columns of zeros between its own, and the forward
        # pass's padding, as a negative one, taken off.
        part = part.reshape(n, *geometry.extent, channels)
        pads = []
        for axis in (0, 1):
            step, low = geometry.strides[axis], phase[axis] - geometry.before[axis]
            span = (geometry.extent[axis] - 1) * step + 1
            pads.append((low, geometry.size[axis] - low - span, step - 1))
        dx = _add(dx, lax.pad(part, _zero(part), ((0, 0, 0), *pads, (0, 0, 0))))
    return dx


def _kernel_gradient(
    phases: dict[Phase, jax.Array], dy: jax.Array, channels: int, geometry: _Geometry
) -> jax.Array:
    """The gradient `(T, C)` by one rank's taps, of the padded `dy`.

    First the sums over blocks of rows, many taps at once, then the small rest. Only the last sum
    runs over N: with the batch sharded it is the one that needs the other devices. Rows that fill
    the last block are multiplied by zeros: where they are infinite, NaN comes of it.
    """
    size = (geometry.rows, geometry.out[1])

    def blocks(array: jax.Array, start: Shift) -> jax.Array:
        box = _box(array, start, size, channels)
        return box.reshape(
            box.shape[0], geometry.rows // geometry.block, geometry.block, box.shape[2]
        )

    dy = blocks(dy, geometry.reach)  # zeros where whole blocks are more than the output
    totals = []
    for first in range(0, len(geometry.taps), _BLOCK_TAPS):
        products = [
            blocks(phases[phase], shift) * dy
            for phase, shift in geometry.taps[first : first + _BLOCK_TAPS]
        ]
        zeros = [_zero(dy)] * len(products)
        sums = lax.reduce(products, zeros, lambda a, b: list(map(lax.add, a, b)), (2,))
        # Fused with the sums that follow it would be one scalar loop again.
        for s in lax.optimization_barrier(sums):
            n, count, _ = s.shape
            totals.append(s.reshape(n, count, geometry.out[1], channels).sum((1, 2)))
    return jnp.stack(totals).sum(1)


def _box(array: jax.Array, start: Shift, size: Pair, channels: int) -> jax.Array:
    """Rows and columns of `array` `(N, rows, columns·C)`, in the dtype of sums."""
    (i, j), (rows, columns) = start, size
    end = (array.shape[0], i + rows, (j + columns) * channels)
    return _wide(lax.slice(array, (0, i, j * channels), end))


def _along_row(tap: jax.Array, columns: int) -> jax.Array:
    """`tap` `(C,)` once for every column: `(1, 1, columns·C)`."""
    return jnp.tile(tap, columns).reshape(1, 1, -1)


def _taps(kernel: jax.Array) -> jax.Array:
    """`kernel` as `(T, R, C)`, one row a tap, in the dtype of sums."""
    return _wide(kernel.reshape(-1, *kernel.shape[2:]))


def _wide(array: jax.Array) -> jax.Array:
    """`array` in the dtype of sums: at least float32, for sums of 16 bits lose too much."""
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    return array.astype(jnp.float32) if narrow else array


def _add(total: jax.Array | None, term: jax.Array) -> jax.Array:
    return term if total is None else total + term


def _zero(array: jax.Array) -> jax.Array:
    return jnp.zeros((), array.dtype)
