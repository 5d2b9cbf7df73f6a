"""Layers that both convolutions are tested with, PyTorch's values, and how results are compared."""

import contextlib

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from chansel_jax.ops.window import Window

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
WINDOW = {"strides": (2, 1), "padding": ((1, 1), (0, 2)), "dilation": (1, 1)}

pads = st.tuples(st.integers(0, 4), st.integers(0, 4))
ANY_LAYER = {
    "size": st.tuples(st.integers(1, 20), st.integers(1, 12)),
    "kernel_size": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "strides": st.tuples(st.integers(1, 4), st.integers(1, 4)),
    "padding": st.one_of(st.sampled_from(("SAME", "VALID")), st.tuples(pads, pads)),
    "dilation": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "channels": st.tuples(st.integers(1, 35), st.integers(1, 35)),
}


@contextlib.contextmanager
def torch_shapes():
    """Within it PyTorch's layers have shapes alone, which it would draw as slowly as numbers."""
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        for name in ("kaiming_normal_", "kaiming_uniform_", "normal_", "uniform_"):
            patch.setattr(torch.nn.init, name, lambda tensor, *_, **__: tensor)
        yield


def normal(*shapes, dtype=jnp.float32):
    """Random arrays."""
    rng = np.random.default_rng(0)
    return [jax.device_put(rng.standard_normal(shape).astype(dtype)) for shape in shapes]


def with_random_norms(module):
    """`module` of PyTorch, its BatchNorms with other values than the initial zeros and ones."""
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.normal_(layer.bias, std=0.3)
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.5, 2)
    return module


def in_torch(*operands, strides, padding, dilation):
    """The output and the gradients that PyTorch computes in float64.

    `operands` are the input, for channel selection the pointwise kernel, the kernel, whose size
    says how many channels it takes at once, and the gradient of the output.
    """
    *operands, dy = (torch.tensor(np.asarray(a, np.float64)) for a in operands)
    x, *pointwise, kernel = (operand.requires_grad_() for operand in operands)
    window = Window.of(strides, padding, dilation)
    rows, columns = window.padding_pairs(tuple(x.shape[1:3]), tuple(kernel.shape[:2]))
    sums = x @ pointwise[0] if pointwise else x
    y = torch.nn.functional.conv2d(
        torch.nn.functional.pad(sums.permute(0, 3, 1, 2), (*columns, *rows)),
        kernel.permute(3, 2, 0, 1),
        stride=strides,
        dilation=dilation,
        groups=sums.shape[3] // kernel.shape[2],
    ).permute(0, 2, 3, 1)
    return [a.detach().numpy() for a in (y, *torch.autograd.grad(y, operands, dy))]


def assert_close(actual, expected, tolerance):
    """Equal up to `tolerance` times the largest element expected."""
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        a, e = np.asarray(a, np.float64), np.asarray(e, np.float64)
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * np.abs(e).max(initial=1e-3))
