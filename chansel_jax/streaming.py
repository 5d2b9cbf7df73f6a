"""Batches of images that do not fit into memory, read ahead by Grain in threads or processes.

The order is that of a training whose images are on the devices, and the step's number alone decides
what comes: a stream can begin at any step, over any number of processes.
"""

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from chansel_jax.data import Split
from chansel_jax.training import Batch, batch_sharding, epoch_order

READ_AHEAD = 2  # batches of a worker, or of a thread


@dataclasses.dataclass(frozen=True)
class TrainingOrder:
    """Which image each place of each step of a training takes.

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

    def __call__(self, step: int, row: int) -> int:
        """The number of the image in a row of a step's batch."""
        epoch, step = divmod(step, self.steps_per_epoch)
        return int(self._epoch(epoch)[step * self.batch_size + row])

    def _epoch(self, epoch: int) -> np.ndarray:
        return _epoch_order(self.key.tobytes(), epoch, self.count)


@functools.lru_cache(maxsize=4)  # threads that read ahead are in two epochs at once
def _epoch_order(key: bytes, epoch: int, count: int) -> np.ndarray:
    return np.asarray(epoch_order(np.frombuffer(key, np.uint32), epoch, count))


@contextlib.contextmanager
def training_batches(
    split: Split, order: TrainingOrder, mesh: Mesh, *, first_step: int, steps: int, workers: int
) -> Iterator[Iterator[Batch]]:
    """The batches of the steps from `first_step` on, within a `with`.

    Args:
        split: the training images.
        order: which comes when.
        mesh: the devices; every process reads the rows of its own.
        first_step: counted from the beginning of the training.
        steps: of the whole training.
        workers: processes that read and decode; 0 does so in threads of this one.
    """
    rows = local_rows(mesh, order.batch_size)
    source = _Rows(split, order, rows, steps)
    with _reading(source, first_step, len(rows), workers) as batches:
        yield (put_batch(batch, mesh) for batch in batches)


@contextlib.contextmanager
def evaluation_batches(
    split: Split, mesh: Mesh, batch_size: int
) -> Iterator[Iterator[tuple[Batch, jax.Array]]]:
    """All images of a split, in order, in batches with their masks, within a `with`.

    The last batch is filled up with the last image, and the mask `(N,)` is False there. It is read
    in threads of this process.
    """
    count = len(split.labels)
    rows = local_rows(mesh, batch_size)
    steps = -(-count // batch_size)
    place = functools.partial(_place_in_order, batch_size)
    source = _Rows(split, lambda step, row: min(place(step, row), count - 1), rows, steps)
    sharding = batch_sharding(mesh)

    def masked(batches):
        for step, batch in enumerate(batches):
            mask = np.array([place(step, row) < count for row in rows])
            yield put_batch(batch, mesh), jax.make_array_from_process_local_data(sharding, mask)

    with _reading(source, 0, len(rows), 0) as batches:
        yield masked(batches)


def _place_in_order(batch_size: int, step: int, row: int) -> int:
    return step * batch_size + row


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that the devices of this process hold, ascending."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted(row for (part,) in parts for row in range(*part.indices(batch_size)))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """A global batch from the rows of this process."""
    sharding = batch_sharding(mesh)
    # Copied, since Grain takes its shared memory back.
    return Batch(
        **{
            name: jax.make_array_from_process_local_data(sharding, np.array(array))
            for name, array in batch.items()
        }
    )


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Grain's source: one after another the images of this process's rows of each step's batch."""

    split: Split
    order: Callable[[int, int], int]
    rows: list[int]
    steps: int

    def __len__(self) -> int:
        return self.steps * len(self.rows)

    def __getitem__(self, position: int) -> dict[str, Any]:
        step, place = divmod(position, len(self.rows))
        number = self.order(step, self.rows[place])
        return {"images": self.split.images[number], "labels": self.split.labels[number]}


@contextlib.contextmanager
def _reading(source: _Rows, first_step: int, rows: int, workers: int) -> Iterator[Iterator[dict]]:
    _parse_flags()
    threads = 1 if workers else os.cpu_count() or 1
    dataset = (
        grain.MapDataset.source(source)[first_step * rows :]
        .batch(rows)
        .to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=READ_AHEAD * threads)
        )
        .mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=READ_AHEAD),
            worker_init_fn=_begin_worker,
        )
    )
    batches = iter(dataset)
    try:
        yield batches
    finally:
        batches.close()


def _parse_flags() -> None:
    # Up to Grain 0.2.18 its workers ask for a flag's value (google/grain issue 1355).
    if not flags.FLAGS.is_parsed():
        logger = logging.getLogger("absl")
        level = logger.level
        flags.FLAGS.mark_as_parsed()
        logger.setLevel(level)  # it has been set to that of a flag


def _begin_worker(_index: int, _count: int) -> None:
    # The order of an epoch is computed by JAX; accelerators are the training's.
    jax.config.update("jax_platforms", "cpu")
    # The training is told to stop, saves, and then ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_training, daemon=True).start()


def _end_with_training() -> None:
    """Ends a worker whose training has been killed."""
    multiprocessing.parent_process().join()
    os._exit(1)
