import os
import pickle

import numpy as np
import pytest

from chansel_jax import data
from chansel_jax.data.summary import summarise
from chansel_jax.digest import digest


@pytest.fixture
def both(tmp_path, write_images):
    """The same images in memory and on disk, and the folder of images."""
    root = tmp_path / "images"
    write_images(root, {"train/cat": 6, "train/dog": 4, "validation/cat": 1, "validation/dog": 1})
    return tuple(load(root, in_memory) for in_memory in (True, False))


def load(root, in_memory=False):
    return data.load("folder", data_dir=root, in_memory=in_memory)


def test_stored_images_are_those_in_memory(both):
    in_memory, stored = both
    assert stored.class_names == in_memory.class_names
    for name, expected in in_memory.splits.items():
        split = stored.splits[name]
        np.testing.assert_array_equal(split.images[:], expected.images)
        np.testing.assert_array_equal(split.labels, expected.labels)
        assert split.images.shape == expected.images.shape == (len(split.images), 8, 8, 3)
        assert split.images.dtype == expected.images.dtype
        assert split.labels.dtype == expected.labels.dtype
        assert split.summary.digest == expected.summary.digest
        np.testing.assert_array_equal(split.summary.mean, expected.summary.mean)
        np.testing.assert_array_equal(split.summary.std, expected.summary.std)


KEYS = [
    *(0, -1, np.int64(3), slice(2, 5), slice(7, None), slice(4, 4), slice(None, None, -2)),
    *(np.array([4, 1, 1]), [2], np.arange(10) % 3 == 0),
]


def test_stored_images_are_indexed_like_arrays(both):
    in_memory, stored = (dataset.splits["train"].images for dataset in both)
    unpickled = pickle.loads(pickle.dumps(stored))
    for key in KEYS:
        expected = in_memory[key]
        np.testing.assert_array_equal(stored[key], expected, err_msg=str(key))
        np.testing.assert_array_equal(unpickled[key], expected, err_msg=str(key))
        if np.ndim(expected) == 4:
            selected = stored.select(key)
            assert selected.shape == expected.shape, key
            np.testing.assert_array_equal(selected[:], expected, err_msg=str(key))


def test_images_that_are_not_there_are_no_damage(both):
    images = both[1].splits["train"].images
    with pytest.raises(IndexError):
        images[10]
    assert len(list(images)) == 10


def test_pickled_images_are_the_names_of_their_files(both):
    images = both[1].splits["train"].images
    images[0]
    assert len(pickle.dumps(images)) < 1000


def test_others_may_read_what_is_kept(both, cache_dir):
    kept, records = (next(cache_dir.glob(f"*/*/*/{name}")) for name in ("summary*", "*record*"))
    assert kept.stat().st_mode == records.stat().st_mode


def test_folder_that_cannot_be_written_does(both, tmp_path, cache_dir, monkeypatch):
    for path in cache_dir.glob("*/*/*/summary*"):
        path.unlink()

    def refuse(*_, **__):
        raise OSError("read-only file system")

    monkeypatch.setattr(np, "savez", refuse)
    splits = load(tmp_path / "images").splits
    assert splits["train"].summary.digest == both[0].splits["train"].summary.digest


def test_digest_and_statistics_are_computed_once(both, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr("chansel_jax.data.cache.summarise_chunks", refuse)
    again = load(tmp_path / "images")
    assert again.splits["train"].summary.digest == both[0].splits["train"].summary.digest


@pytest.mark.parametrize("damaged", ["summary-train.npz", "*train.array_record*"])
def test_damage_is_one_line(both, tmp_path, cache_dir, damaged):
    (path,) = cache_dir.glob(f"*/*/*/{damaged}")
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(data.DataError, match="cannot be read, delete ") as error:
        load(tmp_path / "images").splits["train"].images[:]
    assert "\n" not in str(error.value)


class Command:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_stored_is_executed(both, tmp_path, cache_dir, monkeypatch):
    (path,) = cache_dir.glob("*/*/*/summary-train.npz")
    np.savez(
        path, labels=np.array([Command()], object), image_shape=[8, 8, 3], digest="", mean=0, std=1
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(data.DataError, match="cannot be read, delete "):
        load(tmp_path / "images")
    assert not (tmp_path / "executed").exists()


def test_summary_is_that_of_the_whole_arrays(monkeypatch):
    monkeypatch.setattr("chansel_jax.data.summary.CHUNK", 4)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (11, 3, 5, 3), np.uint8)
    labels = rng.integers(0, 2, 11).astype(np.int32)
    summary = summarise(images, labels)
    assert summary.digest == digest((images, labels))
    np.testing.assert_allclose(summary.mean, images.mean((0, 1, 2), np.float64), rtol=1e-6)
    np.testing.assert_allclose(summary.std, images.std((0, 1, 2), np.float64), rtol=1e-6)
