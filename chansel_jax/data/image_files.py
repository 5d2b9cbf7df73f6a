"""Image files as arrays."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from chansel_jax.data.errors import DataError


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file as `(H, W, 3)` uint8, turned as its EXIF data say.

    Args:
        path: of any format that Pillow reads, with at most 8 bits a channel.
        size: `(H, W)`: scale the image until it covers these pixels and keep the centre; by
            default it stays as it is.

    Raises:
        DataError: if it cannot be read as an image; one line.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with Image.open(path) as image:
            # Pillow's mode tells of more than 8 bits for grey ones only, and would clip the others.
            layouts = [str(tile.args) for tile in image.tile]
            if image.mode.startswith(("I", "F")) or any(";16" in layout for layout in layouts):
                raise ValueError("it has more than 8 bits a channel")
            image = ImageOps.exif_transpose(image)  # as a viewer shows it
            # Pillow asks for this detour where a palette has transparent entries.
            rgb = image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    except Exception as error:  # a broken file can raise almost anything
        raise DataError(f"{path} cannot be read as an image: {error}") from error
    if size is not None and rgb.size != size[::-1]:
        rgb = ImageOps.fit(rgb, size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(rgb)
