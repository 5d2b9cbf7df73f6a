"""Where arrays lie: the devices of all processes as one mesh, data-parallel."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from chansel_jax.functional import Tree


def data_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """`devices`, by default all of all processes, along one axis, `"data"`."""
    devices = jax.devices() if devices is None else devices
    return jax.make_mesh((len(devices),), ("data",), (AxisType.Auto,), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """A batch's: the first axis over all devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def replicate(tree: Tree, mesh: Mesh) -> Tree:
    """`tree` on every device of `mesh`; every process has the same one."""
    sharding = everywhere(mesh)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def put(leaf):
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

    return jax.tree.map(put, tree)


def everywhere(mesh: Mesh) -> NamedSharding:
    """The whole of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises `ValueError` if a batch is not divisible by the devices, with the nearest that are.

    Args:
        batch_size: images of a batch, over all devices.
        mesh: the devices.
        accumulate: parts of the batch, of which each is divided.
    """
    divisor = mesh.size * accumulate
    if batch_size < 1 or batch_size % divisor:
        lower = batch_size // divisor * divisor
        nearest = sorted({max(divisor, batch) for batch in (lower, lower + divisor)})
        nearest = " or ".join(map(str, nearest))
        kind = "divisible" if batch_size > 0 else "positive and divisible"
        by = "the one device" if mesh.size == 1 else f"the {mesh.size} devices"
        by += f" times accumulate={accumulate}" * (accumulate > 1)
        raise ValueError(f"batch_size={batch_size} must be {kind} by {by}: take {nearest}")
