"""CIFAR-10 and CIFAR-100 from their binary archives.

An archive is a gzipped tar file. Each of its files of images is a sequence of records: one or two
label bytes, of which the last counts, then an image as 3 x 32 x 32 bytes, channel by channel.
"""

import dataclasses
import gzip
import math
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from chansel_jax.data.download import download
from chansel_jax.data.errors import DataError
from chansel_jax.data.source import Content, Source, choose_per_class

SPLIT_SEED = 0
IMAGE_SHAPE = (3, 32, 32)

Arrays = tuple[np.ndarray, np.ndarray]  # images and their labels


@dataclasses.dataclass(frozen=True)
class Archive:
    """A binary archive of the CIFAR format.

    Attributes:
        url: where it is.
        sha256: its checksum, in hexadecimal.
        train: the files of the training set, each with its number of records.
        test: the same for the test set.
        class_names: the text file with the name of each label, one a line.
        label_bytes: how many label bytes stand before an image.
    """

    url: str
    sha256: str
    train: Mapping[str, int]
    test: Mapping[str, int]
    class_names: str
    label_bytes: int


CIFAR10 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    train={f"cifar-10-batches-bin/data_batch_{i}.bin": 10_000 for i in range(1, 6)},
    test={"cifar-10-batches-bin/test_batch.bin": 10_000},
    class_names="cifar-10-batches-bin/batches.meta.txt",
    label_bytes=1,
)
CIFAR100 = Archive(
    url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
    sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    train={"cifar-100-binary/train.bin": 50_000},
    test={"cifar-100-binary/test.bin": 10_000},
    class_names="cifar-100-binary/fine_label_names.txt",
    label_bytes=2,
)


def cifar10(archive: Archive = CIFAR10) -> Source:
    """The source of CIFAR-10: 45,000 train, 5,000 validation and 10,000 test images."""
    return Source("cifar10", lambda downloads: _read(archive, downloads, validation_share=10))


def cifar100(archive: Archive = CIFAR100) -> Source:
    """The source of CIFAR-100 with its fine labels: 45,000, 5,000 and 10,000 images."""
    return Source("cifar100", lambda downloads: _read(archive, downloads, validation_share=10))


def dog_cat_bird(archive: Archive = CIFAR10) -> Source:
    """The source of CIFAR-10's birds, cats and dogs: 12,000, 3,000 and 3,000 images."""

    def read(downloads: Path) -> Content:
        return _read(archive, downloads, validation_share=5, classes=("bird", "cat", "dog"))

    return Source("dog_cat_bird", read)


def _read(
    archive: Archive, downloads: Path, *, validation_share: int, classes: Sequence[str] = ()
) -> Content:
    """Reads an archive, downloaded if need be; one in `validation_share` is for validation."""
    path = download(archive.url, archive.sha256, downloads)
    try:
        names, train, test = _read_archive(archive, path)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
        path.unlink()
        raise DataError(
            f"the archive from {archive.url} was corrupt and is removed: {error}"
        ) from error
    if classes:
        labels = [names.index(name) for name in classes]
        names, train, test = classes, _select(*train, labels), _select(*test, labels)

    images, labels = train
    counts = np.bincount(labels)
    chosen, rest = choose_per_class(labels, counts - counts // validation_share, SPLIT_SEED)
    return Content(
        class_names=tuple(names),
        splits={
            "train": zip(images[chosen], labels[chosen], strict=True),
            "validation": zip(images[rest], labels[rest], strict=True),
            "test": zip(*test, strict=True),
        },
    )


def _select(images: np.ndarray, labels: np.ndarray, wanted: Sequence[int]) -> Arrays:
    """The images with the labels `wanted`, which become 0, 1, ... in that order."""
    new_label = np.full(256, -1)
    new_label[wanted] = np.arange(len(wanted))
    new_labels = new_label[labels]
    return images[new_labels >= 0], new_labels[new_labels >= 0]


def _read_archive(archive: Archive, path: Path) -> tuple[Sequence[str], Arrays, Arrays]:
    """The class names and the (images, labels) of train and test; ValueError if corrupt."""
    files = _read_files(path, {archive.class_names, *archive.train, *archive.test})
    names = files[archive.class_names].decode().split()
    train = _read_records(archive, files, archive.train)
    test = _read_records(archive, files, archive.test)
    for _, labels in (train, test):
        if not np.array_equal(np.unique(labels), np.arange(len(names))):
            raise ValueError(f"the labels are not 0 to {len(names) - 1}")
    return names, train, test


def _read_files(path: Path, wanted: set[str]) -> dict[str, bytes]:
    with tarfile.open(path, "r:gz") as tar:
        files = {
            member.name: tar.extractfile(member).read()
            for member in tar
            if member.isfile() and member.name in wanted
        }
    if missing := wanted - files.keys():
        raise ValueError(f"it has no {min(missing)}")
    return files


def _read_records(archive: Archive, files: Mapping[str, bytes], sizes: Mapping[str, int]) -> Arrays:
    """Images (N, 32, 32, 3) and labels (N,), both uint8, of some of the files."""
    record_bytes = archive.label_bytes + math.prod(IMAGE_SHAPE)
    for name, records in sizes.items():
        if len(files[name]) != records * record_bytes:
            raise ValueError(f"{name} has {len(files[name])} bytes, not {records * record_bytes}")
    joined = np.frombuffer(b"".join(files[name] for name in sizes), np.uint8)
    records = joined.reshape(-1, record_bytes)
    images = records[:, archive.label_bytes :].reshape(-1, *IMAGE_SHAPE).transpose(0, 2, 3, 1)
    return images, records[:, archive.label_bytes - 1]
