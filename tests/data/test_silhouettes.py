import collections
import gzip
import importlib.resources
import os
import pickle
import sys
import warnings

import numpy as np
import pytest

from chansel_jax.data import DataError, load
from chansel_jax.data.silhouettes import (
    IMAGES_FILE,
    LABELS_FILE,
    STORED,
    STORED_SIZE,
    divide,
    read_silhouettes,
)

PACKAGE_LABELS = [1, 2, 5]  # bird, cat, dog in the package


@pytest.fixture(scope="module")
def silhouettes(tmp_path_factory):
    return load(data_dir=tmp_path_factory.mktemp("silhouettes"))


def packaged(file_name):
    folder = importlib.resources.files("animal_shape_mnist") / "data" / "Animal Shape"
    with warnings.catch_warnings(action="ignore"):  # the pickles name a module that has moved
        return pickle.loads(gzip.decompress((folder / file_name).read_bytes()))


def test_is_the_default_and_has_two_splits(silhouettes):
    assert silhouettes.name == "silhouettes"
    assert silhouettes.class_names == ("bird", "cat", "dog")
    assert list(silhouettes.splits) == ["train", "validation"]


@pytest.mark.parametrize(("split", "per_class"), [("train", 800), ("validation", 200)])
def test_counts_and_types(silhouettes, split, per_class):
    images, labels = silhouettes.splits[split].images, silhouettes.splits[split].labels
    assert images.shape == (3 * per_class, 32, 32, 3)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert labels.dtype == np.int32
    assert np.bincount(labels).tolist() == [per_class] * 3


def test_no_copy_or_mirror_image_on_both_sides(silhouettes):
    train, validation = (silhouettes.splits[split].images for split in ("train", "validation"))
    seen = {view.tobytes() for image in train for view in (image, image[:, ::-1])}
    assert len(seen) < 2 * len(train)  # there are pairs to be torn apart
    assert not seen & {image.tobytes() for image in validation}


@pytest.mark.parametrize("copy", [lambda x: x, lambda x: x[..., ::-1]], ids=["copy", "mirror"])
def test_pairs_are_kept_for_training(copy):
    images = np.random.default_rng(0).integers(0, 256, (70, 4, 4), np.uint8)
    paired = np.concatenate([images, copy(images[:30])])
    _, validation = divide(paired, np.arange(100) % 2)
    assert len(validation) == 20
    assert set(validation) <= set(range(30, 70))


def test_pixels_are_those_of_the_package_in_a_frame_of_background(silhouettes):
    all_images, all_labels = packaged(IMAGES_FILE), packaged(LABELS_FILE)
    images = np.concatenate([split.images for split in silhouettes.splits.values()])
    labels = np.concatenate([split.labels for split in silhouettes.splits.values()])
    assert (images == images[..., :1]).all()
    for label, package_label in enumerate(PACKAGE_LABELS):
        loaded = images[labels == label][..., 0]
        expected = all_images[all_labels == package_label]
        inner = loaded[:, 2:-2, 2:-2]
        assert loaded.sum() == inner.sum()
        assert collections.Counter(x.tobytes() for x in inner) == collections.Counter(
            x.tobytes() for x in expected
        )


def test_two_preparations_are_equal(silhouettes, tmp_path):
    again = load("silhouettes", data_dir=tmp_path)
    for split, expected in silhouettes.splits.items():
        np.testing.assert_array_equal(again.splits[split].images, expected.images)
        np.testing.assert_array_equal(again.splits[split].labels, expected.labels)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "animal_shape_mnist", None)
    with pytest.raises(DataError, match=r"^the silhouettes need .*: pip install [-a-z]+$"):
        read_silhouettes()


class Command:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"not gzip", "Not a gzipped file"),
        (gzip.compress(b"no pickle"), "pickle|load key"),
        (gzip.compress(pickle.dumps(Command())), r"it names \w+\.mkdir"),
        (gzip.compress(pickle.dumps([1, 2])), "no .* array"),
    ],
    ids=["absent", "not gzip", "not a pickle", "another object", "not an array"],
)
@pytest.mark.parametrize("broken", [IMAGES_FILE, LABELS_FILE])
def test_changed_package(tmp_path, monkeypatch, broken, content, reason):
    folder = tmp_path / "data" / "Animal Shape"
    folder.mkdir(parents=True)
    good = {
        IMAGES_FILE: np.zeros((STORED, STORED_SIZE, STORED_SIZE), np.uint8),
        LABELS_FILE: np.zeros(STORED, np.int64),
    }
    old_name = (b"numpy._core.multiarray", b"numpy.core.multiarray")
    for name, array in good.items():
        pickled = pickle.dumps(array, protocol=3).replace(*old_name)
        folder.joinpath(name).write_bytes(gzip.compress(pickled, 1))
    folder.joinpath(broken).unlink()
    if content is not None:
        folder.joinpath(broken).write_bytes(content)
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"^{broken} of the package .*({reason}).*: pip install"):
        read_silhouettes()
    assert not (tmp_path / "executed").exists()
