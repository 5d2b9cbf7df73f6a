"""Which images a batch holds, and how it comes onto the devices.

The number of a step and the seed alone decide it, wherever the images lie and over any number of
processes, so that a training may go on from any step.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from chansel_jax.training.devices import batch_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Images with their classes: what a step takes, or a whole split of a data set.

    Attributes:
        images: `(N, H, W, C)` uint8.
        labels: `(N,)` int32.
    """

    images: jax.Array
    labels: jax.Array


@functools.partial(jax.jit, static_argnames="count")
def epoch_order(key: jax.Array, epoch: int, count: int) -> jax.Array:
    """The order `(count,)` int32 in which an epoch, counted from 0, visits `count` images.

    Args:
        key: that of the `TrainState`.
        epoch: which one.
        count: of the training images.
    """
    order_key, _ = jax.random.split(jax.random.wrap_key_data(key))
    key = jax.random.fold_in(order_key, epoch)
    return jax.random.permutation(key, count).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """Which images each step of a training takes.

    Attributes:
        key: `(2,)` uint32, that of the `TrainState`.
        count: of the training images.
        batch_size: images a step, over all devices.
        steps_per_epoch: whole steps.
    """

    key: np.ndarray
    count: int
    batch_size: int
    steps_per_epoch: int

    def __call__(self, step: int) -> np.ndarray:
        """The numbers `(batch_size,)` of a step's images."""
        epoch, step = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.key.tobytes(), epoch, self.count)
        return order[step * self.batch_size :][: self.batch_size]


@functools.lru_cache(maxsize=16)  # with short epochs each thread that reads may be in another
def _epoch_order(key: bytes, epoch: int, count: int) -> np.ndarray:
    with jax.transfer_guard("allow"):  # once an epoch, not at every step
        return np.asarray(epoch_order(np.frombuffer(key, np.uint32), epoch, count))


@dataclasses.dataclass(frozen=True)
class GivenOrder:
    """All images in their own order; the last batch is filled up with the last image.

    Attributes:
        count: of the images.
        batch_size: over all devices.
    """

    count: int
    batch_size: int

    def __len__(self) -> int:
        """How many batches there are."""
        return -(-self.count // self.batch_size)

    def __call__(self, step: int) -> np.ndarray:
        """The numbers `(batch_size,)` of a batch's images."""
        return np.minimum(step * self.batch_size + np.arange(self.batch_size), self.count - 1)

    def new(self, step: int) -> np.int32:
        """How many images of a batch, the first ones, are not the last image repeated."""
        return np.int32(min(self.batch_size, self.count - step * self.batch_size))


@functools.partial(jax.jit, static_argnames="mesh")
def take(split: Batch, numbers: np.ndarray, mesh: Mesh) -> Batch:
    """The batch of the images `numbers` `(N,)` of a split that lies on every device of `mesh`."""
    numbers = lax.with_sharding_constraint(numbers, batch_sharding(mesh))
    batch = Batch(split.images[numbers], split.labels[numbers])
    return lax.with_sharding_constraint(batch, batch_sharding(mesh))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that the devices of this process hold, ascending."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[part] for (part,) in parts]))


def put_batch(rows: Batch, mesh: Mesh) -> Batch:
    """A global batch from the rows of this process."""
    put = functools.partial(jax.make_array_from_process_local_data, batch_sharding(mesh))
    return jax.tree.map(put, rows)
