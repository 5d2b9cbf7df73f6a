"""Batches of images that do not fit into memory, read ahead by Grain in threads or processes.

They are those of a training whose images are on the devices, in the same order.
"""

import contextlib
import errno
import functools
import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import resource_tracker

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from chansel_jax.data import DataError, Split
from chansel_jax.training.batches import Batch, GivenOrder, TrainingOrder, local_rows, put_batch

READ_AHEAD = 2  # batches of a worker, or of a thread
MOST_THREADS = 8
# Workers hand their batches over in pipes. Grain's shared memory is no faster, is 64 MB in Docker,
# and what is left in it when the process ends is reported as leaked.
IN_PIPES = grain.experimental.DatasetOptions(min_shm_size=2**62)  # bytes


@contextlib.contextmanager
def read_batches(
    split: Split, order: TrainingOrder | GivenOrder, mesh: Mesh, steps: range, workers: int = 0
) -> Iterator[Iterator[Batch]]:
    """The batches of `steps`, within a `with`.

    Their iterator raises `DataError` if images cannot be read, or a worker ends.

    Args:
        split: the images.
        order: which comes when.
        mesh: the devices; every process reads the rows of its own.
        steps: consecutive ones, counted from the beginning of the training or of the split.
        workers: processes that read and decode; 0 (the default) does so in threads of this one.
    """
    _parse_flags()
    if not workers:
        split.images[0]  # opens the files, before several threads want to
    read = functools.partial(_read, split, order, local_rows(mesh, order.batch_size))
    threads = 1 if workers else min(MOST_THREADS, os.cpu_count() or 1)
    dataset = (
        grain.MapDataset.range(steps.start, steps.stop)
        .map(read)
        .to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=READ_AHEAD * threads)
        )
    )
    dataset = grain.experimental.WithOptionsIterDataset(dataset, IN_PIPES).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=READ_AHEAD),
        worker_init_fn=_begin_worker,
    )
    with contextlib.closing(iter(dataset)) as batches:
        checked = _checked(batches, workers)
        with _signals_held_back():  # each worker begins when a batch of it is asked for
            first = list(itertools.islice(checked, max(1, workers)))
        in_order = itertools.chain(first, checked)
        yield map(functools.partial(put_batch, mesh=mesh), in_order)


def _read(split: Split, order: TrainingOrder | GivenOrder, rows: np.ndarray, step: int) -> Batch:
    numbers = order(step)[rows]
    return Batch(split.images[numbers], split.labels[numbers])


def _checked(batches: Iterator[Batch], workers: int) -> Iterator[Batch]:
    try:
        yield from batches
    except RuntimeError as error:  # Grain's, where a worker ends
        reason = str(error).partition(". ")[0]  # logs come next, which we do not keep
        raise DataError(
            f"workers={workers}: the images cannot be read ({reason}); memory may be short, which "
            "fewer workers take less of"
        ) from error
    except OSError as error:
        if not workers or error.errno != errno.ENOSPC:
            raise
        raise DataError(
            f"workers={workers}: no worker can begin, since the shared memory (/dev/shm) is "
            "full; workers=0 needs none of it"
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
