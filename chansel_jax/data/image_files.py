"""Image files: where they are, and as arrays."""

import contextlib
import functools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from chansel_jax.data.errors import DataError

# The folders, in lower case, in which operating systems and network disks keep thumbnails, deleted
# files and older states; of those that begin with a dot, as most do, none need be named.
METADATA = (
    *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "~snapshot"),
    *("$recycle.bin", "system volume information", "lost+found"),
    *("network trash folder", "temporary items"),
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or holds what nobody put there."""
    # Archives that are made on a Mac have a folder __MACOSX.
    return name.startswith((".", "__MACOSX")) or name.lower() in METADATA


def leads_back(folder: Path) -> bool:
    """Whether `folder` is a link to one of the folders that it lies in."""
    return folder.is_symlink() and any(map(folder.samefile, folder.absolute().parents))


def files_below(root: Path, depth: int | None = None) -> Iterator[Path]:
    """All files in `root` or at most so many folders deeper, but hidden ones.

    Links are followed, unless they lead back. Pipes and links to nothing are among the files.
    """
    for folder, names, files in os.walk(root, followlinks=True):
        place = Path(folder)
        deepest = len(place.relative_to(root).parts) == depth
        names[:] = [
            name
            for name in sorted(names)
            if not (deepest or is_hidden(name) or leads_back(place / name))
        ]
        yield from (place / name for name in sorted(files) if not is_hidden(name))


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those that Pillow reads by itself: for EPS it would run Ghostscript on the file."""
    Image.init()
    return tuple(name for name in Image.OPEN if name != "EPS")


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file as `(H, W, 3)` uint8, turned as its EXIF data say.

    Args:
        path: of any format that Pillow reads but EPS, with at most 8 bits a channel. EXIF data that
            are damaged are passed over.
        size: `(H, W)`: scale the image until it covers these pixels and keep the centre; by
            default it stays as it is.

    Raises:
        DataError: if it cannot be read as an image; one line.
    """
    try:
        if not path.is_file() and path.exists():  # a pipe would be waited for
            raise ValueError("it is no file")
        with warnings.catch_warnings(), Image.open(path, formats=_formats()) as image:
            warnings.simplefilter("ignore")  # of damaged EXIF data
            # Pillow's mode tells of more than 8 bits for grey ones only, and would clip the others.
            layouts = [str(tile.args) for tile in image.tile]
            if image.mode.startswith(("I", "F")) or any(";16" in layout for layout in layouts):
                raise ValueError("it has more than 8 bits a channel")
            image.load()
            with contextlib.suppress(Exception):  # damaged EXIF data, which are not the image
                ImageOps.exif_transpose(image, in_place=True)  # as a viewer shows it
            # Pillow asks for this detour where a palette has transparent entries.
            rgb = image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    except Exception as error:  # a broken file can raise almost anything
        raise DataError(f"{path} cannot be read as an image: {error}") from error
    if size is not None and rgb.size != size[::-1]:
        rgb = ImageOps.fit(rgb, size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(rgb)
