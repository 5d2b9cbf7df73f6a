"""Batches of images that do not fit into memory, read ahead by Grain in threads or processes.

The order is that of a training whose images are on the devices, and the step's number alone decides
what comes: a stream can begin at any step, over any number of processes.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from chansel_jax.data import DataError, Split
from chansel_jax.training.devices import batch_sharding
from chansel_jax.training.step import Batch, epoch_order

READ_AHEAD = 2  # batches of a worker, or of a thread
MOST_THREADS = 8


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


@functools.lru_cache(maxsize=2 * MOST_THREADS)  # with short epochs each thread may be in another
def _epoch_order(key: bytes, epoch: int, count: int) -> np.ndarray:
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

    def __call__(self, step: int) -> np.ndarray:
        """The numbers `(batch_size,)` of a batch's images."""
        return np.minimum(self._places(step), self.count - 1)

    def mask(self, step: int) -> np.ndarray:
        """`(batch_size,)` bool: False where the last image is repeated."""
        return self._places(step) < self.count

    def _places(self, step: int) -> np.ndarray:
        return step * self.batch_size + np.arange(self.batch_size)


@contextlib.contextmanager
def training_batches(
    split: Split, order: TrainingOrder, mesh: Mesh, *, first_step: int, steps: int, workers: int
) -> Iterator[Iterator[Batch]]:
    """The batches of the steps from `first_step` on, within a `with`.

    Their iterator raises `DataError` if images cannot be read, or a worker ends.

    Args:
        split: the training images.
        order: which comes when.
        mesh: the devices; every process reads the rows of its own.
        first_step: counted from the beginning of the training.
        steps: of the whole training.
        workers: processes that read and decode; 0 does so in threads of this one.
    """
    rows = local_rows(mesh, order.batch_size)
    with _reading(_Batches(split, order, rows, steps), first_step, workers) as batches:
        yield map(functools.partial(put_batch, mesh=mesh), batches)


@contextlib.contextmanager
def evaluation_batches(
    split: Split, mesh: Mesh, batch_size: int
) -> Iterator[Iterator[tuple[Batch, jax.Array]]]:
    """All images of a split, in order, in batches with their masks, within a `with`.

    The last batch is filled up with the last image, and the mask `(N,)` is False there. It is read
    in threads of this process.
    """
    order, rows = GivenOrder(len(split.labels), batch_size), local_rows(mesh, batch_size)
    steps = -(-order.count // batch_size)

    def masked(step, batch):
        mask = jax.make_array_from_process_local_data(batch_sharding(mesh), order.mask(step)[rows])
        return put_batch(batch, mesh), mask

    with _reading(_Batches(split, order, rows, steps), first_step=0, workers=0) as batches:
        yield map(masked, itertools.count(), batches)


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """The rows of a global batch that the devices of this process hold, ascending."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.sort(np.concatenate([np.arange(batch_size)[part] for (part,) in parts]))


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
class _Batches:
    """Grain's source: of each step the rows of this process."""

    split: Split
    order: Callable[[int], np.ndarray]
    rows: np.ndarray
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        numbers = self.order(step)[self.rows]
        return {"images": self.split.images[numbers], "labels": self.split.labels[numbers]}


@contextlib.contextmanager
def _reading(
    source: _Batches, first_step: int, workers: int
) -> Iterator[Iterator[dict[str, np.ndarray]]]:
    _parse_flags()
    if not workers:
        source.split.images[0]  # opens the files, before several threads want to
    threads = 1 if workers else min(MOST_THREADS, os.cpu_count() or 1)
    dataset = (
        grain.MapDataset.source(source)[first_step:]
        .to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=READ_AHEAD * threads)
        )
        .mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=READ_AHEAD),
            worker_init_fn=_begin_worker,
        )
    )
    with contextlib.closing(iter(dataset)) as batches:
        checked = _checked(batches, workers)
        with _signals_held_back():  # each worker begins when a batch of it is asked for
            first = collections.deque(itertools.islice(checked, max(1, workers)))
        yield itertools.chain(_taken_from(first), checked)
    # The last batches, which Grain leaves in cycles: their shared memory must be given back while
    # there are threads to do so.
    gc.collect()


def _taken_from(batches: collections.deque) -> Iterator[dict]:
    while batches:
        yield batches.popleft()  # what is still held is not given back to Grain's shared memory


def _checked(batches: Iterator[dict], workers: int) -> Iterator[dict]:
    try:
        yield from batches
    except RuntimeError as error:  # Grain's, where a worker ends
        reason = str(error).partition(". ")[0]  # logs come next, which we do not keep
        raise DataError(
            f"workers={workers}: the images cannot be read ({reason}); memory may be short, which "
            "fewer workers take less of"
        ) from error


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """What begins within it, process or thread, never hears of SIGINT and SIGTERM.

    A terminal sends them to all processes at once, and workers must outlive them: the training
    saves first, and then ends its workers itself.
    """
    resource_tracker.ensure_running()  # else the first worker would start it, which lets them in
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    threading.Thread(target=_end_with_training, daemon=True).start()


def _end_with_training() -> None:
    """Ends a worker whose training has been killed."""
    multiprocessing.parent_process().join()
    os._exit(1)
