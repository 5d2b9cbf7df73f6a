"""Data sets by name."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from chansel_jax.data.cache import cache_folder, load_source
from chansel_jax.data.cifar import cifar10, cifar100, dog_cat_bird
from chansel_jax.data.dataset import Dataset
from chansel_jax.data.errors import DataError
from chansel_jax.data.folder import folder, image_among
from chansel_jax.data.silhouettes import silhouettes

SOURCES = {
    "silhouettes": silhouettes,
    "dog_cat_bird": dog_cat_bird,
    "cifar10": cifar10,
    "cifar100": cifar100,
}
DATASETS = (*SOURCES, "folder")


def load(
    name: str = "silhouettes",
    *,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    classes: Sequence[str] = (),
    train_per_class: int | None = None,
    split_seed: int = 0,
    fold: int = 0,
    in_memory: bool = True,
) -> Dataset:
    """Loads a data set; the first time it is prepared, and downloaded if need be.

    Args:
        name: one of DATASETS.
        data_dir: for "folder" the tree of images, PATH/{train,validation,test}/<class>/*, without
            validation or test or both, or PATH/<class>/*; the folder validation may also be
            called val, valid or eval. For the others where downloads and prepared data sets are
            kept; by default where tensorflow-datasets keeps them, `TFDS_DATA_DIR` or
            ~/tensorflow_datasets, which is also where "folder" does.
        in_memory: whether the images are read into memory; else they are `StoredImages`.

    These are for "folder" alone:
        image_size: scale the shorter side to this many pixels and keep the centre; by default
            the images must be of one size.
        classes: the classes to take, in the order of their labels; by default all,
            alphabetically.
        train_per_class: how many training images to take of each class. Where there is no
            validation set, the rest is that; by default a fifth is.
        split_seed: which images those are.
        fold: which part of the images is the validation set, where there is none. The folds 0, 1
            and so on of one `split_seed` have no image in common. Default 0.

    Returns:
        The data set, with images (N, H, W, 3) uint8 and labels (N,) int32.

    Raises:
        DataError: anything is wrong with the arguments, the images or the download; one line.
    """
    if name == "folder":
        if data_dir is None:
            raise DataError("the data set folder needs --data-dir=PATH, the folder of images")
        images, kept = Path(data_dir).expanduser().resolve(), cache_folder().resolve()
        if kept.is_relative_to(images):
            raise DataError(
                f"TFDS_DATA_DIR={kept}, where the prepared images are kept, must not be in "
                f"data_dir={images}, where the images are"
            )
        source = folder(
            data_dir,
            image_size=image_size,
            classes=classes,
            train_per_class=train_per_class,
            split_seed=split_seed,
            fold=fold,
        )
        return dataclasses.replace(load_source(source, in_memory=in_memory), name=name)

    if name not in SOURCES:
        raise DataError(f"there is no data set {name}, but {', '.join(DATASETS)}")
    for option, value in (
        ("--image-size", image_size),
        ("--classes", ",".join(classes) or None),
        ("--train-per-class", train_per_class),
        ("--split-seed", split_seed or None),
        ("--fold", fold or None),
    ):
        if value is not None:
            raise DataError(f"{option}={value} is for the data set folder only, not for {name}")
    if data_dir is not None and (image := image_among(cache_folder(data_dir))):
        raise DataError(
            f"data_dir={data_dir} holds images ({image}), among which nothing is to be kept of the "
            f"data set {name}: images in a folder are --dataset=folder"
        )
    return load_source(SOURCES[name](), data_dir, in_memory=in_memory)
