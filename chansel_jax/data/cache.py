"""Prepared data sets: one tensorflow-datasets builder that keeps any source as array_record.

Nothing here imports TensorFlow, and nothing is printed but progress bars on a terminal.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core import constants

from chansel_jax.data.dataset import Dataset, Split
from chansel_jax.data.errors import DataError
from chansel_jax.data.source import Source
from chansel_jax.data.stored import StoredImages, unreadable
from chansel_jax.data.summary import CHUNK, Summary, summarise_chunks
from chansel_jax.data.terminal import progress_bar, quiet
from chansel_jax.files import is_address, replaced

PART = 64  # images of a chunk that a thread reads


@dataclasses.dataclass(eq=False)
class SourceConfig(tfds.core.BuilderConfig):
    """A builder config, named after its source."""

    source: Source | None = None


class LocalInfo(tfds.core.DatasetInfo):
    """Asks no bucket; the original does, and leaves an empty temporary folder each time."""

    def initialize_from_bucket(self) -> None:
        pass


class ChanselImages(tfds.core.GeneratorBasedBuilder):
    """Keeps the images of its config's source as PNG, in the order the source gives."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # no checksums to look up: sources verify their own downloads

    def _info(self) -> LocalInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(),
        }
        return LocalInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        content = self.builder_config.source.read(Path(dl_manager.download_dir))
        self.info.features["label"].names = content.class_names
        return {
            name: self._generate_examples(examples) for name, examples in content.splits.items()
        }

    def _generate_examples(self, examples: Iterable[tuple[np.ndarray, int]]) -> Iterator:
        for key, (image, label) in enumerate(examples):
            yield key, {"image": Image.fromarray(image), "label": int(label)}

    # A library does not print: these two lines would go to the standard output.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def cache_folder(data_dir: str | Path | None = None) -> Path:
    """Where prepared data sets and downloads are kept, as `load_source` has it.

    Raises:
        DataError: that is in the user's home, and there is none; or it is an address as of
            `gs://`, or not UTF-8, as array_record has it.
    """
    data_dir = data_dir or constants.get_default_data_dir()
    try:
        if is_address(str(data_dir)):
            raise DataError(f"{data_dir} is an address; prepared data sets are kept in a folder")
        folder = Path(data_dir).expanduser()
        str(folder.absolute()).encode()
        return folder
    except UnicodeEncodeError as error:
        told = ascii(str(data_dir))
        raise DataError(f"{told} must be UTF-8 for prepared data sets to be kept in it") from error
    except RuntimeError as error:
        raise DataError(
            f"prepared data sets are kept in {data_dir}, but no home is known: give another folder "
            "as TFDS_DATA_DIR"
        ) from error


def load_source(
    source: Source, data_dir: str | Path | None = None, *, in_memory: bool = True
) -> Dataset:
    """Loads a source's prepared data set, after preparing it if that has not been done.

    Args:
        source: where the images come from.
        data_dir: where prepared data sets and downloads are kept; by default the folder that
            tensorflow-datasets uses, `TFDS_DATA_DIR` or ~/tensorflow_datasets.
        in_memory: whether the images are read at once. Else they stay where they are, and only
            what one pass over them tells is read; it is kept beside them.

    Raises:
        DataError: the source is at fault, `data_dir` cannot be written, or what has been
            prepared cannot be read.
    """
    data_dir = cache_folder(data_dir)
    folder = data_dir / ChanselImages.name / source.name
    with quiet():
        with unreadable(folder):
            builder = _builder(source, data_dir)
        try:
            builder.download_and_prepare()
        except (OSError, RuntimeError) as error:  # the latter of a full disk
            if not folder.joinpath(str(builder.version)).exists():  # no other process was faster
                raise DataError(f"cannot prepare {source.name} in {data_dir}: {error}") from error
        finally:
            with contextlib.suppress(OSError):  # it is not empty, unless nothing was prepared
                folder.rmdir()
        with unreadable(folder):
            return _read(_builder(source, data_dir), in_memory)


def _builder(source: Source, data_dir: Path) -> ChanselImages:
    config = SourceConfig(source.name, source=source)
    return ChanselImages(config=config, data_dir=data_dir, file_format="array_record")


def _read(builder: ChanselImages, in_memory: bool) -> Dataset:
    read = _read_split if in_memory else _refer_to_split
    return Dataset(
        name=builder.builder_config.name,
        class_names=tuple(builder.info.features["label"].names),
        splits={name: read(builder, name) for name in builder.info.splits},
    )


def _read_split(builder: ChanselImages, name: str) -> Split:
    records = builder.as_data_source(name)
    images = np.empty((len(records), *records[0]["image"].shape), np.uint8)
    labels = np.empty(len(records), np.int32)
    for start, chunk_images, chunk_labels in _chunks(records, name):
        images[start : start + len(chunk_images)] = chunk_images
        labels[start : start + len(chunk_images)] = chunk_labels
    return Split(images, labels)


def _refer_to_split(builder: ChanselImages, name: str) -> Split:
    folder = Path(builder.data_dir)
    found = _kept_summary(folder / f"summary-{name}.npz", builder, name)
    labels = found["labels"]
    image_shape = tuple(map(int, found["image_shape"]))
    images = StoredImages(folder, name, image_shape, np.arange(len(labels)))
    return Split(images, labels, Summary(str(found["digest"]), found["mean"], found["std"]))


def _kept_summary(path: Path, builder: ChanselImages, name: str) -> dict[str, Any]:
    """What is to be known of stored images, by one pass over them, which is made once."""
    if path.exists():
        with path.open("rb") as file, np.load(file) as found:
            return dict(found)
    records = builder.as_data_source(name)
    shape = (len(records), *records[0]["image"].shape)
    labels = np.empty(len(records), np.int32)

    def images():
        for start, chunk_images, chunk_labels in _chunks(records, name):
            labels[start : start + len(chunk_images)] = chunk_labels
            yield chunk_images

    summary = summarise_chunks(images(), shape, labels)
    measured = {"image_shape": shape[1:], "labels": labels} | dataclasses.asdict(summary)
    with (
        contextlib.suppress(OSError),  # a folder of others; it is measured again next time
        replaced(path) as partial,
        partial.open("wb") as file,
    ):
        np.savez(file, **measured)
    return measured


def _chunks(records: Any, name: str) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each chunk's first number, images `(n, H, W, C)` and labels `(n,)`, with a progress bar."""
    count = len(records)
    with ThreadPoolExecutor() as pool, progress_bar(f"Reading {name}", count) as advance:
        for start in range(0, count, CHUNK):
            indices = range(start, min(start + CHUNK, count))
            parts = [list(indices[i : i + PART]) for i in range(0, len(indices), PART)]
            found = [record for part in pool.map(records.__getitems__, parts) for record in part]
            yield (
                start,
                np.stack([record["image"] for record in found]),
                np.array([record["label"] for record in found], np.int32),
            )
            advance(len(found))
