"""Any folder of images, one folder a class.

Understood are PATH/{train,validation,test}/<class>/, without validation or test or both, and
PATH/<class>/. Beside train, the folder of the validation images may also be called val, valid or
eval. Hidden files and files with other extensions than IMAGE_EXTENSIONS are passed over, and so are
prepared data sets and folders of thumbnails and the like; images that lie elsewhere are refused, as
nobody could tell what class they are of.
"""

import hashlib
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from chansel_jax.data.cache import ChanselImages
from chansel_jax.data.errors import DataError
from chansel_jax.data.image_files import files_below, is_hidden, leads_back, read_image
from chansel_jax.data.source import Content, Source, choose_per_class
from chansel_jax.data.terminal import progress_bar
from chansel_jax.errors import listed

SPLIT_FOLDERS = {  # what the folder of a split may be called
    "train": ("train",),
    "validation": ("validation", "val", "valid", "eval"),
    "test": ("test",),
}
IMAGE_EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
# What a prepared data set leaves in the folder that it is kept in.
PREPARED, DOWNLOADS = ChanselImages.name, "downloads"
VALIDATION_SHARE = 5  # one image in five

Files = list[tuple[Path, int]]  # image files and their labels
Unread = dict[Path, tuple[int, int] | None]  # image files and the sizes that they are read in


def folder(
    root: str | Path,
    *,
    image_size: int | None = None,
    classes: Sequence[str] = (),
    train_per_class: int | None = None,
    split_seed: int = 0,
    fold: int = 0,
) -> Source:
    """The source of the images under `root`; the arguments are those of `load`.

    Raises:
        DataError: `root` is no folder of the kind, or does not have what is asked for. The images
            themselves are read, and refused, later.
    """
    root = Path(root).expanduser().resolve()
    for option, value in (("--image-size", image_size), ("--train-per-class", train_per_class)):
        if value is not None and value < 1:
            raise DataError(f"{option}={value} must be at least 1")
    for option, value in (("--split-seed", split_seed), ("--fold", fold)):
        if value < 0:
            raise DataError(f"{option}={value} must not be negative")
    try:
        class_names, found = _find(root, classes)
        division = train_per_class, split_seed, fold
        # What was prepared before there were folds is the first of them.
        settings = division if fold else division[:-1]
        digest = _digest(root, found, class_names, image_size, *settings)
    except OSError as error:
        raise DataError(f"cannot read {root}: {error}") from error
    splits = _divide(found, class_names, *division)

    def read(download_dir: Path) -> Content:
        size = image_size and (image_size, image_size)
        unread = {path: size for files in splits.values() for path, _ in files}
        first = splits["train"][0][0]
        shape = _read(first, unread).shape
        return Content(
            class_names,
            {name: _images(files, unread, first, shape) for name, files in splits.items()},
        )

    return Source(f"folder-{digest}", read)


def image_among(root: Path) -> Path | None:
    """Some image in `root`, no deeper than `folder` takes images; None if there is none."""
    return _image_below(root, depth=2)


def _find(root: Path, classes: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Files]]:
    """The names of the classes, and the files of every split there is a folder for."""
    if not root.is_dir():
        hint = ": an archive must be unpacked first" if root.is_file() else ""
        raise DataError(f"data_dir={root} is no folder{hint}")
    roots = _split_folders(root)
    class_names = tuple(classes) or _subfolders(roots["train"])
    if len(class_names) == 1:  # the images may be those that lie beside the one folder
        _refuse_loose_images(roots["train"], "the classes: each class has a folder")
    _check_classes(class_names, _subfolders(roots["train"]), roots["train"])
    found = {}
    for split, split_root in roots.items():
        there = _subfolders(split_root)
        if not classes and (unknown := set(there) - set(class_names)):
            raise DataError(f"the class {min(unknown)} of {split_root} is not in {roots['train']}")
        if missing := set(class_names) - set(there):
            raise DataError(f"the class {min(missing)} of {roots['train']} is not in {split_root}")
        _refuse_loose_images(split_root, "the classes: each class has a folder")
        found[split] = [
            (path, label)
            for label, name in enumerate(class_names)
            for path in _image_files(split_root / name)
        ]
    return class_names, found


def _split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split; `root` itself is train where it holds the classes."""
    there = _subfolders(root)
    if "train" not in there:
        known = {name for names in SPLIT_FOLDERS.values() for name in names}
        alone = [
            name
            for name in there
            if name in ("test", "validation")
            or (name.lower() in known | {"training"} and _subfolders(root / name))
        ]
        if alone:
            raise DataError(f"{root} has a folder {alone[0]} but no folder train")
        return {"train": root}
    roots = {}
    for split, names in SPLIT_FOLDERS.items():
        found = [name for name in names if name in there]
        if len(found) > 1:
            raise DataError(f"{root} has the folders {' and '.join(found)}: only one can be used")
        if found:
            roots[split] = root / found[0]
    _refuse_loose_images(root, f"the folders {', '.join(path.name for path in roots.values())}")
    known = [name for names in SPLIT_FOLDERS.values() for name in names]
    for name in there:
        if name not in known and _image_below(root / name):
            raise DataError(f"{root / name} holds images, but is none of {', '.join(known)}")
    return roots


def _refuse_loose_images(root: Path, beside: str) -> None:
    paths = [path for path in root.iterdir() if not is_hidden(path.name)]
    if loose := [path for path in paths if _is_image(path)]:
        raise DataError(f"{min(loose)} lies beside {beside}")
    if lost := [path for path in paths if not path.exists()]:  # it may have been a class
        raise DataError(f"{min(lost)} is a link to nothing")


def _check_classes(wanted: Sequence[str], there: Sequence[str], root: Path) -> None:
    if not there:
        hint = ": nobody could tell what its images show" if _image_below(root, depth=0) else ""
        raise DataError(f"{root} has no folders, one is expected for each class{hint}")
    if len(set(wanted)) < len(wanted):
        raise DataError(f"--classes={','.join(wanted)} names a class twice")
    if len(wanted) < 2:
        raise DataError(f"{root} has one class only, {wanted[0]}: to tell classes apart takes two")
    for name in wanted:
        if name not in there:
            raise DataError(f"there is no class {name} in {root}, but {', '.join(there)}")
    if changed := [repr(name) for name in wanted if not _can_be_kept(name)]:
        encoding = sys.getfilesystemencoding()
        of_locale = "" if encoding == "utf-8" else f"; or set PYTHONUTF8=1, it is {encoding} now"
        raise DataError(
            f"rename {listed(changed)} in {root}: the name of a class must be UTF-8 without line "
            "breaks or other characters that are not seen, and neither begin nor end with a blank"
            f"{of_locale}"
        )


def _can_be_kept(name: str) -> bool:
    """Whether `name` stays what it is as a line of a text file, and can be told from others."""
    # Words of Persian hold a character that is not seen, and so do some emoji.
    kinds = {unicodedata.category(character) for character in set(name) - {"\u200c", "\u200d"}}
    return name == name.strip() and kinds.isdisjoint(("Cc", "Cf", "Cs", "Zl", "Zp"))


def _subfolders(root: Path) -> tuple[str, ...]:
    """The names of the folders in `root` that are neither hidden nor of a prepared data set."""
    with os.scandir(root) as entries:
        names = {e.name for e in entries if e.is_dir() and not is_hidden(e.name)}
    names = {name for name in names if not leads_back(root / name)}
    if PREPARED in names:
        names.remove(PREPARED)
        if not _image_below(root / DOWNLOADS):
            names.discard(DOWNLOADS)
    return tuple(sorted(names))


def _image_files(root: Path) -> list[Path]:
    for name in _subfolders(root):
        if deeper := _image_below(root / name):
            raise DataError(f"{deeper} lies in a folder within the class {root.name}: move it up")
    paths = [path for path in root.iterdir() if _is_image(path)]
    if not paths:
        raise DataError(f"the class {root.name} has no images: {root}")
    return sorted(paths)


def _image_below(root: Path, depth: int | None = None) -> Path | None:
    """Some image in `root` or so many folders deeper; None if there is none but hidden ones."""
    return next(filter(_is_image, files_below(root, depth)), None)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_EXTENSIONS and not is_hidden(path.name)


def _digest(root: Path, found: dict[str, Files], *settings: object) -> str:
    """Changes with everything that decides what the prepared data set holds."""
    digest = hashlib.sha256(repr((str(root), settings)).encode())
    for split, files in found.items():
        for path, label in files:
            try:
                stat = path.stat()
            except OSError:  # a link to nothing is refused later, with all that cannot be read
                stat = path.lstat()
            entry = (split, label, path.name, stat.st_size, stat.st_mtime_ns)
            digest.update(repr(entry).encode())
    return digest.hexdigest()[:32]


def _divide(
    found: dict[str, Files],
    class_names: Sequence[str],
    train_per_class: int | None,
    seed: int,
    fold: int,
) -> dict[str, Files]:
    """Splits off the validation set, where there is none, and limits the training set."""
    if "validation" in found and fold:
        raise DataError(
            f"--fold={fold} chooses images for validation, for which there is a folder already"
        )
    if "validation" in found and train_per_class is None:
        return found
    labels = np.array([label for _, label in found["train"]])
    counts = np.bincount(labels, minlength=len(class_names))
    split = "validation" not in found  # so each class has to have an image left for it
    needed = (train_per_class or 1) + split
    for name, count in zip(class_names, counts, strict=True):
        if count < needed:
            option = f" with --train-per-class={train_per_class}" if train_per_class else ""
            purpose = "training and validation" if split else "training"
            raise DataError(f"{purpose}{option} needs {needed} images of {name}, not {count}")
    if train_per_class is None:
        sizes = counts - np.maximum(1, counts // VALIDATION_SHARE)
    else:
        sizes = [train_per_class] * len(class_names)
    folds = int(min(counts // (counts - sizes))) if split else 1
    if fold >= folds:
        raise DataError(
            f"--fold={fold} must be at most {folds - 1}: the images for validation can be chosen "
            f"{folds} times without taking one twice"
        )
    chosen, rest = choose_per_class(labels, sizes, seed, fold)
    train = [found["train"][i] for i in chosen]
    validation = found.get("validation") or [found["train"][i] for i in rest]
    return {**found, "train": train, "validation": validation}


def _images(
    files: Files, unread: Unread, first: Path, shape: tuple[int, ...]
) -> Iterator[tuple[np.ndarray, int]]:
    """The decoded images, refused unless they have the shape of the `first`."""
    for path, label in files:
        image = _read(path, unread)
        del unread[path]
        if image.shape != shape:
            sizes = [f"{width} x {height}" for height, width, _ in (shape, image.shape)]
            raise DataError(
                f"the images differ in size, {first} is {sizes[0]} and {path} is {sizes[1]}: "
                "give --image-size=N to resize them"
            )
        yield image, label


def _read(path: Path, unread: Unread) -> np.ndarray:
    """The decoded image; if it cannot be read, all that are `unread` are looked at and refused."""
    try:
        return read_image(path, unread[path])
    except DataError as error:
        others = [other for other in unread if other != path]
        faults = [str(error), *_faults(others)]
        raise DataError(listed(faults, "; ")) from error


def _faults(paths: Sequence[Path]) -> Iterator[str]:
    """Why those that cannot be read as images cannot."""
    with progress_bar("Looking for others", len(paths)) as advance:
        for path in paths:
            try:
                read_image(path)
            except DataError as error:
                yield str(error)
            advance(1)
