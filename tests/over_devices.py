"""Layers over a mesh of devices, of one process or of several, held against one device.

    python tests/over_devices.py PORT PROCESSES PROCESS

It ends with an error if an output or a gradient is another.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from chansel_jax import ChannelSelectionConv, SubKernelConv


def compare(kind: AxisType, layer_type: type[nnx.Module]) -> None:
    """Compares the output of a layer over all devices, and all gradients."""
    graph, parameters = nnx.split(layer_type(2, 3, (3, 3), strides=2, rngs=nnx.Rngs(0)))
    shape = (2 * jax.device_count(), 5, 4, 2)
    images = np.random.default_rng(0).standard_normal(shape, np.float32)

    def loss(parameters, images):
        outputs = nnx.merge(graph, parameters)(images)
        return jnp.sum(jnp.sin(outputs)), outputs

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    expected = step(parameters, images)
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(kind,))
    batch, whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        found = step(jax.tree.map(lambda a: over(whole, a), parameters), over(batch, images))
    jax.tree.map(hold, found, expected)


def over(sharding: NamedSharding, array: jax.Array | np.ndarray) -> jax.Array:
    """`array`, which every process has, over the devices of all processes."""
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def hold(found: jax.Array, expected: jax.Array) -> None:
    """Holds what this process has of `found` against the same part of `expected`."""
    for shard in found.addressable_shards:
        np.testing.assert_allclose(shard.data, expected[shard.index], 1e-5, 1e-5)


if __name__ == "__main__":
    port, processes, process = sys.argv[1:]
    if int(processes) > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", int(processes), int(process))
    for kind in (AxisType.Auto, AxisType.Explicit):
        for layer_type in (ChannelSelectionConv, SubKernelConv):
            compare(kind, layer_type)
