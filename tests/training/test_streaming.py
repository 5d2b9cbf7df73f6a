import errno
import itertools
import multiprocessing.synchronize
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from chansel_jax.data import DataError, Split
from chansel_jax.training import batches as batches_module
from chansel_jax.training import devices, streaming
from chansel_jax.training.batches import GivenOrder, TrainingOrder, epoch_order

COUNT, BATCH_SIZE, STEPS = 37, 8, 4  # an epoch leaves five images out


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (COUNT, 4, 4, 3), np.uint8)
    return Split(images, rng.integers(0, 3, COUNT).astype(np.int32))


@pytest.fixture(scope="module")
def order():
    key = np.asarray(jax.random.key_data(jax.random.key(5)))
    return TrainingOrder(key, COUNT, BATCH_SIZE, STEPS)


@pytest.mark.parametrize(("first_step", "workers"), [(0, 0), (6, 0), (3, 2)])
def test_batches_are_those_of_the_order_from_any_step_on(split, order, first_step, workers):
    mesh = devices.data_mesh()
    with streaming.read_batches(
        split, order, mesh, range(first_step, 3 * STEPS), workers
    ) as batches:
        found = list(itertools.islice(batches, STEPS))
        # While workers read ahead, nothing lies in shared memory, of which Docker has little.
        assert not list(Path("/dev/shm").glob("psm_*"))
        found += batches
    assert len(found) == 3 * STEPS - first_step
    in_order = [np.asarray(epoch_order(order.key, epoch, COUNT)) for epoch in range(3)]
    for step, batch in enumerate(found, start=first_step):
        epoch, place = divmod(step, STEPS)
        index = in_order[epoch][place * BATCH_SIZE :][:BATCH_SIZE]
        np.testing.assert_array_equal(batch.images, split.images[index])
        np.testing.assert_array_equal(batch.labels, split.labels[index])
        assert batch.images.sharding.is_equivalent_to(devices.batch_sharding(mesh), 4)


@pytest.mark.parametrize("batch_size", [8, 64])
def test_evaluation_sees_every_image_once(split, batch_size):
    mesh, order = devices.data_mesh(), GivenOrder(COUNT, batch_size)
    with streaming.read_batches(split, order, mesh, range(len(order))) as batches:
        found = list(batches)
    new = [batch.images[: order.new(number)] for number, batch in enumerate(found)]
    np.testing.assert_array_equal(np.concatenate(new), split.images)
    assert {len(batch.labels) for batch in found} == {batch_size}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([slice(0, 3), slice(3, 6)], [0, 1, 2, 3, 4, 5]),
        ([slice(4, 6), slice(0, 2)], [0, 1, 4, 5]),  # of a mesh that mixes the processes' devices
        ([slice(None)], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_processes_hold_the_rows_of_their_devices(monkeypatch, parts, expected):
    class Sharding:
        def addressable_devices_indices_map(self, shape):
            return {number: (part,) for number, part in enumerate(parts)}

    monkeypatch.setattr(batches_module, "batch_sharding", lambda mesh: Sharding())
    assert batches_module.local_rows(None, 6).tolist() == expected


KILLED = """
import multiprocessing, time
import jax, numpy as np
from chansel_jax.training import devices, streaming
from chansel_jax.training.batches import TrainingOrder
from chansel_jax.data import Split

if __name__ == "__main__":
    split = Split(np.zeros((8, 2, 2, 3), np.uint8), np.zeros(8, np.int32))
    order = TrainingOrder(np.zeros(2, np.uint32), 8, 4, 2)
    with streaming.read_batches(
        split, order, devices.data_mesh(), range(10**6), workers=1
    ) as batches:
        next(batches)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(600)
"""


def test_workers_end_with_a_training_that_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        (worker,) = map(int, process.stdout.readline().split())
        assert is_running(worker)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker)


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


class Damaged(np.ndarray):
    """Images of which some cannot be read."""

    def __getitem__(self, key):
        if np.ndim(key):
            raise DataError("they are damaged")
        return super().__getitem__(key)


class Deadly(np.ndarray):
    """Images that end whoever reads them."""

    def __getitem__(self, key):
        if np.ndim(key):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)


@pytest.mark.parametrize(
    ("images", "workers", "message"),
    [
        (Damaged, 0, "they are damaged"),
        (Damaged, 1, "they are damaged"),
        (Deadly, 1, "workers=1: the images cannot be read .*memory may be short"),
    ],
)
def test_images_that_cannot_be_read_are_an_error(split, order, images, workers, message):
    damaged = Split(split.images.view(images), split.labels)
    mesh = devices.data_mesh()
    with (
        pytest.raises(DataError, match=message) as error,
        streaming.read_batches(damaged, order, mesh, range(STEPS), workers) as batches,
    ):
        next(batches)
    assert "\n" not in str(error.value)


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_shared_memory_without_room_for_a_worker_is_named(monkeypatch, split, order):
    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", no_room)
    mesh = devices.data_mesh()
    with (
        pytest.raises(DataError, match="^workers=1: .*/dev/shm.* is full"),
        streaming.read_batches(split, order, mesh, range(STEPS), 1) as batches,
    ):
        next(batches)
