"""Kernels that are sums of several in training, and one kernel everywhere else.

A convolution is linear in its kernel, so that branches beside each other, each with a scale for
every output channel, compute what one convolution with the scaled sum of their kernels does. To
train the branches therefore takes no more than to train that sum: this is the online
reparameterisation of Hu et al., "Online Convolutional Re-parameterization" (CVPR 2022). Only the
optimiser knows of branches; the network has the sums at every step.
"""

import functools
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Tree = Any
SCALES = "branch_scales"


class BranchedState(NamedTuple):
    """What is updated in the place of the parameters, and the state of its optimiser."""

    branches: Tree
    optimizer: optax.OptState


def branched(optimizer: optax.GradientTransformation, count: int) -> optax.GradientTransformation:
    """`optimizer`, which updates `count` branches of every kernel of a convolution, and its scales.

    Kernels are `kernel` `(H, W, I, O)`, and `pointwise`, `depthwise` and `subspace`, each with a
    scale for every element of its last axis. All other parameters are updated as without branches.
    The parameters, nested dicts of arrays or a state of Flax, become what the branches sum up to:
    whatever else has changed them since `init` is undone, so `branched` is the outermost of those
    that change updates.
    """

    def init(params: Tree) -> BranchedState:
        branches = apart(_plain(params), count)
        return BranchedState(branches, optimizer.init(branches))

    def update(gradients: Tree, state: BranchedState, params: Tree) -> tuple[Tree, BranchedState]:
        own = _plain(params)
        gradients = jax.tree.map(lambda g, p: g.astype(p.dtype), _plain(gradients), own)
        (of_branches,) = jax.vjp(together, state.branches)[1](gradients)
        updates, inner = optimizer.update(of_branches, state.optimizer, state.branches)
        branches = optax.apply_updates(state.branches, updates)
        changes = jax.tree.map(jnp.subtract, together(branches), own)
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

    In the place of `{"kernel": x}` stands `{"kernel": {"branch0": {"kernel": x0}, …,
    "branch_scales": {"scale": s}}}`, with `s` of shape `(count, O)`, whose elements begin as 1. The
    branches are drawn at random around the kernel, so that each has `count` times its variance and
    their mean is the kernel. With steps of the same size in every branch, as those of AdamW and
    Muon are, the kernel then begins to move as far a step as without branches, and further by the
    steps of the scales: with four branches up to 1.5 times as far by AdamW, and twice by Muon.
    """
    return _apart(params, count, "")


def _apart(params: Tree, count: int, path: str) -> Tree:
    found = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            value = _apart(value, count, f"{path}{name}.")
        elif jax.tree.leaves(value) and is_kernel(name, value):  # what is frozen has no leaves
            drawn = _drawn(value, count, f"{path}{name}")
            branches = {f"branch{i}": {name: branch} for i, branch in enumerate(drawn)}
            scale = jnp.ones((count, value.shape[-1]), value.dtype)
            value = branches | {SCALES: {"scale": scale}}
        found[name] = value
    return found


def together(branches: Tree) -> Tree:
    """The parameters that a network has, of what `apart` returns: means of the scaled branches."""
    found = {}
    for name, value in branches.items():
        if isinstance(value, Mapping) and SCALES in value:
            scales = value[SCALES]["scale"]
            parts = [value[f"branch{i}"][name] for i in range(len(scales))]
            scales = scales.reshape(len(parts), *[1] * (parts[0].ndim - 1), -1)
            value = sum(part * scales[i] for i, part in enumerate(parts)) / len(parts)
        elif isinstance(value, Mapping):
            value = together(value)
        found[name] = value
    return found


def _plain(params: Tree) -> Tree:
    """Nested dicts of arrays, also of a state of Flax, whose leaves are variables."""
    if isinstance(params, Mapping):
        return {name: _plain(value) for name, value in params.items()}
    leaves = jax.tree.leaves(params)
    return leaves[0] if leaves else params


def _drawn(kernel: jax.Array, count: int, path: str) -> jax.Array:
    """The branches `(count, *kernel.shape)`."""
    key = jax.random.fold_in(jax.random.key(0), zlib.crc32(path.encode()))
    # Networks with other seeds begin with other kernels, and so draw other branches.
    first = kernel[(0,) * kernel.ndim].astype(jnp.float32)
    key = jax.random.fold_in(key, jax.lax.bitcast_convert_type(first, jnp.uint32))
    noise = jax.random.normal(key, (count, *kernel.shape), kernel.dtype)
    noise = (noise - jnp.mean(noise, axis=0, keepdims=True)) * (count**0.5 * jnp.std(kernel))
    return kernel[None] + noise
