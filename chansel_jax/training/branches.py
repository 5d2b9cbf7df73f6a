"""Kernels that are sums of several in training, and one kernel everywhere else.

A convolution is linear in its kernel, so that branches beside each other, each with a scale for
every output channel, compute what one convolution with the scaled sum of their kernels does. To
train the branches therefore takes no more than to train that sum: this is the online
reparameterisation of Hu et al., "Online Convolutional Re-parameterization" (CVPR 2022). Only the
optimiser knows of branches; the network has the sums at every step.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Tree = Any
SCALES = "scales"


class BranchedState(NamedTuple):
    """What is updated in the place of the parameters, and the state of its optimiser."""

    branches: Tree
    optimizer: optax.OptState


def branched(optimizer: optax.GradientTransformation, count: int) -> optax.GradientTransformation:
    """`optimizer`, which updates `count` branches of every kernel of a convolution, and its scales.

    All other parameters are updated as without branches. Kernels are `kernel` `(H, W, I, O)`, and
    `pointwise`, `depthwise` and `subspace`, whose last axis are the output channels too.
    """

    def init(params: Tree) -> BranchedState:
        branches = apart(_plain(params), count)
        return BranchedState(branches, optimizer.init(branches))

    def update(gradients: Tree, state: BranchedState, params: Tree) -> tuple[Tree, BranchedState]:
        (of_branches,) = jax.vjp(together, state.branches)[1](_plain(gradients))
        updates, inner = optimizer.update(of_branches, state.optimizer, state.branches)
        branches = optax.apply_updates(state.branches, updates)
        changes = jax.tree.map(jnp.subtract, together(branches), _plain(params))
        changes = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(changes))
        return changes, BranchedState(branches, inner)

    return optax.GradientTransformation(init, update)


def is_kernel(name: str, parameter: jax.Array) -> bool:
    """Whether a parameter of this name, of a layer, is a convolution's kernel or a part of it."""
    return name in ("pointwise", "depthwise", "subspace") or (
        name == "kernel" and parameter.ndim == 4
    )


@functools.partial(jax.jit, static_argnums=1)
def apart(params: Tree, count: int) -> Tree:
    """`params`, with `count` branches and their scales in the place of every kernel.

    In the place of `{"kernel": x}` stands `{"kernel": {"branch0": {"kernel": x0}, …, "scales":
    {"scale": s}}}`, with `s` of shape `(count, O)`, of which each element begins as `1 / count`.
    The branches are drawn at random around the kernel, so that each has `count` times its variance
    and their mean is the kernel. With a rate that is the same for every branch, as those of AdamW
    and Muon are, their sum then begins to move as far a step as without branches.
    """
    found = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            value = apart(value, count)
        elif is_kernel(name, value):
            branches = {f"branch{i}": {name: x} for i, x in enumerate(_drawn(value, count))}
            scale = jnp.full((count, value.shape[-1]), 1 / count, value.dtype)
            value = branches | {SCALES: {"scale": scale}}
        found[name] = value
    return found


def together(branches: Tree) -> Tree:
    """The parameters that a network has, of what `apart` returns."""
    found = {}
    for name, value in branches.items():
        if isinstance(value, Mapping) and SCALES in value:
            parts = jnp.stack([each[name] for key, each in value.items() if key != SCALES])
            value = jnp.einsum("b...o,bo->...o", parts, value[SCALES]["scale"])
        elif isinstance(value, Mapping):
            value = together(value)
        found[name] = value
    return found


def _plain(params: Tree) -> Tree:
    """Nested dicts of arrays, also of a state of Flax, whose leaves are variables."""
    if isinstance(params, Mapping):
        return {name: _plain(value) for name, value in params.items()}
    (array,) = jax.tree.leaves(params)
    return array


def _drawn(kernel: jax.Array, count: int) -> jax.Array:
    """The branches `(count, *kernel.shape)`."""
    # Networks with other seeds begin with other kernels, and so draw other branches.
    first = jax.lax.bitcast_convert_type(kernel.ravel()[0].astype(jnp.float32), jnp.uint32)
    key = jax.random.fold_in(jax.random.key(0), first)
    noise = jax.random.normal(key, (count, *kernel.shape), kernel.dtype)
    noise = (noise - jnp.mean(noise, axis=0, keepdims=True)) * (count**0.5 * jnp.std(kernel))
    return kernel[None] + noise
