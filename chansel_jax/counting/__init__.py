"""Parameters and multiply-adds: of any function that JAX traces, and of layers in closed form.

Nothing is computed. Convolutions and matrix products have multiply-adds; adding a bias, BatchNorm,
ReLU, pooling and residual sums count nothing. Channel selection counts as the two parts it is
defined by, whichever lowering computes it.
"""

from chansel_jax.counting.closed_forms import (
    LayerCount,
    break_even,
    chansel_cost,
    count_network,
    subkernel_cost,
)
from chansel_jax.counting.modules import Count, Row, count

__all__ = [
    "Count",
    "LayerCount",
    "Row",
    "break_even",
    "chansel_cost",
    "count",
    "count_network",
    "subkernel_cost",
]
