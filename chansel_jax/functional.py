"""A network as pure functions of its parameters."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from chansel_jax.conv import SubspaceChannelSelectionConv

Tree = Any


def network_tree(network: nnx.Module) -> dict[str, Tree]:
    """The `params` and `batch_stats` of `network`, as nested dicts."""
    _, params, batch_stats, _ = nnx.split(network, nnx.Param, nnx.BatchStat, ...)
    return {"params": nnx.to_pure_dict(params), "batch_stats": nnx.to_pure_dict(batch_stats)}


def not_finite_in(tree: Tree) -> list[str]:
    """The paths of the arrays of `tree`, `"params.classifier.bias"`, with an infinity or NaN."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(tree))
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, leaf in leaves
        if not np.isfinite(leaf).all()
    ]


def apply_function(network: nnx.Module, *, train: bool) -> Callable:
    """The pure function `(params, batch_stats, images, dropout_key) -> (logits, batch_stats)`.

    Args:
        network: gives the structure only; parameters and statistics are arguments.
        train: whether BatchNorm takes the batch's statistics, and dropout draws with `dropout_key`.
    """
    network = nnx.clone(network)
    network.train() if train else network.eval()
    graph, _, _, rest = nnx.split(network, nnx.Param, nnx.BatchStat, ...)

    def apply(params, batch_stats, images, dropout_key):
        module = nnx.merge(graph, params, batch_stats, nnx.to_pure_dict(rest))
        rngs = None if dropout_key is None else nnx.Rngs(dropout=dropout_key)
        # Flax computes with several dtypes, which JAX may have been told to refuse.
        with jax.numpy_dtype_promotion("standard"):
            logits = module(images, rngs=rngs)
        return logits, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return apply


def orthonormal_loss_function(
    network: nnx.Module, weight: float = 0.1
) -> Callable[[Tree], jax.Array] | None:
    """The pure function of `network`'s parameters that adds up its layers' orthonormal losses.

    Args:
        network: gives the structure only.
        weight: what the sum is multiplied with, as Haase and Amthor do by default.

    Returns:
        The function `(params) -> loss`, or None where no layer is a `SubspaceChannelSelectionConv`.
    """

    def layers(module):
        modules = (module for _, module in nnx.iter_modules(module))
        return [layer for layer in modules if isinstance(layer, SubspaceChannelSelectionConv)]

    if not layers(network):
        return None
    graph, _, rest = nnx.split(network, nnx.Param, ...)

    def loss(params):
        module = nnx.merge(graph, params, nnx.to_pure_dict(rest))
        return weight * sum(layer.orthonormal_loss() for layer in layers(module))

    return loss
