import numpy as np
import pytest

from chansel_jax.data import load
from chansel_jax.data.silhouettes import divide

# Of the images and labels: runs are compared by them, and go on only with the same.
DIGESTS = {
    "train": "b73df9be6fdda18e7fe7c1792f7ebb5e6c66b40b9b144c096a7ac5bc4616c126",
    "validation": "fa8a9c9e2eacb5e44ad7139b808b3b2d09b86ddb4c19036b496a70a3f67fb90e",
}


@pytest.fixture(scope="module")
def silhouettes(tmp_path_factory):
    return load(data_dir=tmp_path_factory.mktemp("silhouettes"))


def test_is_the_default_and_has_two_splits(silhouettes):
    assert silhouettes.name == "silhouettes"
    assert silhouettes.class_names == ("bird", "cat", "dog")
    assert list(silhouettes.splits) == ["train", "validation"]


def test_images_labels_and_their_order_are_always_the_same(silhouettes):
    assert {name: split.summary.digest for name, split in silhouettes.splits.items()} == DIGESTS


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
