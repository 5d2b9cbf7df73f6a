"""Layers that both convolutions are tested with, and how results are compared."""

import hypothesis.strategies as st
import jax
import numpy as np

NAMES = ("kernel_size", "strides", "padding", "dilation", "channels")
LAYERS = (
    ((1, 1), (1, 1), "SAME", (1, 1), (5, 3)),
    ((1, 1), (2, 3), "VALID", (1, 1), (16, 32)),  # native looks at every sixth pixel only
    ((1, 1), (2, 2), ((1, 0), (0, 2)), (1, 1), (4, 8)),
    ((3, 3), (1, 1), "SAME", (1, 1), (16, 16)),
    ((3, 3), (1, 1), ((5, 6), (7, 4)), (1, 1), (3, 17)),
    ((3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1), (16, 32)),
    ((3, 3), (2, 2), "SAME", (2, 1), (7, 40)),
    ((3, 3), (4, 5), "VALID", (1, 2), (33, 5)),
    ((2, 5), (1, 2), ((0, 3), (4, 0)), (2, 1), (9, 16)),
    ((7, 7), (2, 2), ((3, 3), (3, 3)), (1, 1), (3, 16)),
)
"""Of images of 11 × 13 pixels."""

pads = st.tuples(st.integers(0, 4), st.integers(0, 4))
ANY_LAYER = {
    "size": st.tuples(st.integers(1, 20), st.integers(1, 12)),
    "kernel_size": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "strides": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "padding": st.one_of(st.sampled_from(("SAME", "VALID")), st.tuples(pads, pads)),
    "dilation": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "channels": st.tuples(st.integers(1, 35), st.integers(1, 35)),
}


def assert_close(actual, expected, tolerance):
    """Equal up to `tolerance` times the largest element expected."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max(initial=1e-3))
