import collections
import dataclasses
import gzip
import hashlib
import io
import tarfile

import numpy as np
import pytest
from tensorflow_datasets.core.download import checksums

from chansel_jax.data import DataError, cifar
from chansel_jax.data.cache import load_source

CLASSES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]
FINE_CLASSES = [f"fine{i}" for i in range(20)]


@dataclasses.dataclass
class Small:
    """A small archive: what is in it, and what `cifar` has to know of it."""

    archive: cifar.Archive
    files: dict[str, bytes]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]

    def packed(self, *others):
        """The archive's bytes; `others` are members without content."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, content in self.files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            for info in others:
                tar.addfile(info)
        return buffer.getvalue()

    def served_by(self, server, packed=None):
        """The archive as that which the server gives from now on."""
        server.body = self.packed() if packed is None else packed
        server.status, server.announced = 200, None
        checksum = hashlib.sha256(server.body).hexdigest()
        return dataclasses.replace(self.archive, url=server.url, sha256=checksum)


def random_images(labels):
    rng = np.random.default_rng(len(labels))
    labels = rng.permutation(labels)
    return rng.integers(0, 256, (len(labels), 32, 32, 3), np.uint8), labels


def records(images, labels, prefix=b""):
    return b"".join(
        prefix + bytes([label]) + b"".join(image[..., c].tobytes() for c in range(3))
        for image, label in zip(images, labels, strict=True)
    )


@pytest.fixture
def small10():
    train, test = random_images(np.arange(100) % 10), random_images(np.arange(20) % 10)
    names = [f"cifar-10-batches-bin/data_batch_{i}.bin" for i in range(1, 6)]
    parts = zip(names, np.split(train[0], 5), np.split(train[1], 5), strict=True)
    files = {name: records(images, labels) for name, images, labels in parts}
    files["cifar-10-batches-bin/test_batch.bin"] = records(*test)
    files["cifar-10-batches-bin/batches.meta.txt"] = "\n".join([*CLASSES, "", ""]).encode()
    files["cifar-10-batches-bin/readme.html"] = b"not needed"
    archive = dataclasses.replace(
        cifar.CIFAR10,
        train=dict.fromkeys(cifar.CIFAR10.train, 20),
        test=dict.fromkeys(cifar.CIFAR10.test, 20),
    )
    return Small(archive, files, train, test)


@pytest.fixture
def small100():
    train, test = random_images(np.arange(200) % 20), random_images(np.arange(20))
    files = {
        "cifar-100-binary/train.bin": records(*train, prefix=b"\x13"),
        "cifar-100-binary/test.bin": records(*test, prefix=b"\x13"),
        "cifar-100-binary/coarse_label_names.txt": b"coarse\n",
        "cifar-100-binary/fine_label_names.txt": "\n".join([*FINE_CLASSES, ""]).encode(),
    }
    archive = dataclasses.replace(
        cifar.CIFAR100,
        train=dict.fromkeys(cifar.CIFAR100.train, 200),
        test=dict.fromkeys(cifar.CIFAR100.test, 20),
    )
    return Small(archive, files, train, test)


def pairs(images, labels):
    return collections.Counter(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


def assert_holds(dataset, train, test, validation_per_class):
    """Train and validation together are `train`, divided evenly; test is `test`, in order."""
    splits = dataset.splits
    assert list(splits) == ["train", "validation", "test"]
    assert set(np.bincount(splits["validation"].labels)) == {validation_per_class}
    assert len(set(np.bincount(splits["train"].labels))) == 1
    joined = [pairs(splits[name].images, splits[name].labels) for name in ("train", "validation")]
    assert joined[0] + joined[1] == pairs(*train)
    np.testing.assert_array_equal(splits["test"].images, test[0])
    np.testing.assert_array_equal(splits["test"].labels, test[1])
    assert all(split.images.flags.c_contiguous for split in splits.values())
    assert {split.labels.dtype for split in splits.values()} == {np.dtype(np.int32)}


def files_under(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def refusal(source, data_dir):
    with pytest.raises(DataError) as caught:
        load_source(source, data_dir)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_cifar10(server, small10, tmp_path):
    dataset = load_source(cifar.cifar10(small10.served_by(server)), tmp_path)
    assert dataset.class_names == tuple(CLASSES)
    assert_holds(dataset, small10.train, small10.test, validation_per_class=1)


def test_cifar100_takes_the_fine_labels(server, small100, tmp_path):
    dataset = load_source(cifar.cifar100(small100.served_by(server)), tmp_path)
    assert dataset.class_names == tuple(FINE_CLASSES)
    assert_holds(dataset, small100.train, small100.test, validation_per_class=1)


def test_dog_cat_bird(server, small10, tmp_path):
    dataset = load_source(cifar.dog_cat_bird(small10.served_by(server)), tmp_path)
    assert dataset.class_names == ("bird", "cat", "dog")

    def selected(images, labels):
        keep = np.isin(labels, [2, 3, 5])
        return images[keep], np.array([{2: 0, 3: 1, 5: 2}[label] for label in labels[keep]])

    assert_holds(dataset, selected(*small10.train), selected(*small10.test), 2)


def test_two_data_sets_share_one_download(server, small10, tmp_path):
    archive = small10.served_by(server)
    for source in (cifar.cifar10(archive), cifar.dog_cat_bird(archive), cifar.cifar10(archive)):
        load_source(source, tmp_path)
    assert server.requests == 1


def test_split_is_the_same_each_time(server, small10, tmp_path):
    archive = small10.served_by(server)
    first, second = (
        load_source(cifar.cifar10(archive), tmp_path / name).splits["validation"]
        for name in ("first", "second")
    )
    np.testing.assert_array_equal(first.images, second.images)


def test_nothing_is_printed(server, small10, tmp_path, capfd):
    load_source(cifar.cifar10(small10.served_by(server)), tmp_path)
    assert capfd.readouterr() == ("", "")


def test_refused_download_leaves_nothing_and_can_be_repeated(server, small10, tmp_path):
    archive = small10.served_by(server)
    server.status = 404
    message = refusal(cifar.cifar10(archive), tmp_path)
    assert message.startswith(f"cannot download {archive.url}: 404 ")
    assert files_under(tmp_path) == []

    dataset = load_source(cifar.cifar10(small10.served_by(server)), tmp_path)
    assert_holds(dataset, small10.train, small10.test, validation_per_class=1)


def without_file(small):
    del small.files["cifar-10-batches-bin/data_batch_3.bin"]
    return small.packed()


def with_short_file(small):
    small.files["cifar-10-batches-bin/test_batch.bin"] = small.files[
        "cifar-10-batches-bin/test_batch.bin"
    ][:-1]
    return small.packed()


def with_too_few_records(small):
    small.files["cifar-10-batches-bin/data_batch_3.bin"] = small.files[
        "cifar-10-batches-bin/data_batch_3.bin"
    ][: 19 * 3073]
    return small.packed()


def with_another_label(small):
    name = "cifar-10-batches-bin/test_batch.bin"
    small.files[name] = b"\x0a" + small.files[name][1:]
    return small.packed()


def with_link(small):
    """To the file of another member, in place of one."""
    name = "cifar-10-batches-bin/test_batch.bin"
    del small.files[name]
    link = tarfile.TarInfo(name)
    link.type, link.linkname = tarfile.SYMTYPE, "data_batch_1.bin"
    return small.packed(link)


def cut_in_half(small):
    packed = small.packed()
    return packed[: len(packed) // 2]


def not_gzipped(small):
    return gzip.decompress(small.packed())


@pytest.mark.parametrize(
    ("corrupt", "reason"),
    [
        (without_file, "it has no cifar-10-batches-bin/data_batch_3.bin"),
        (with_short_file, "test_batch.bin has 61459 bytes, not 61460"),
        (with_too_few_records, "data_batch_3.bin has 58387 bytes, not 61460"),
        (with_another_label, "the labels are not 0 to 9"),
        (with_link, "it has no cifar-10-batches-bin/test_batch.bin"),
        (cut_in_half, ""),
        (not_gzipped, "not a gzip file"),
    ],
)
def test_corrupt_archive_leaves_nothing(server, small10, tmp_path, corrupt, reason):
    archive = small10.served_by(server, corrupt(small10))
    message = refusal(cifar.cifar10(archive), tmp_path)
    assert message.startswith(f"the archive from {archive.url} was corrupt and is removed: ")
    assert reason in message
    assert files_under(tmp_path) == []


def test_members_that_leave_the_folder_are_passed_over(server, small10, tmp_path):
    for name in ("../escaped", f"{tmp_path}/escaped", "cifar-10-batches-bin/../escaped"):
        small10.files[name] = b"content"
    data_dir = tmp_path / "data" / "sets"
    dataset = load_source(cifar.cifar10(small10.served_by(server)), data_dir)
    assert_holds(dataset, small10.train, small10.test, validation_per_class=1)
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize(
    ("archive", "coarse"), [(cifar.CIFAR10, 0), (cifar.CIFAR100, 1)], ids=["10", "100"]
)
def test_archives_are_those_that_tensorflow_datasets_lists(archive, coarse):
    assert archive.sha256 == checksums.get_all_url_infos()[archive.url].checksum
    assert sum(archive.train.values()) == 50_000
    assert sum(archive.test.values()) == 10_000
    assert archive.label_bytes == 1 + coarse
