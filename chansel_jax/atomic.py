"""Files that are written as a whole, or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path`, to be written within a `with`; in its end it takes the place of `path`.

    A reader sees the old file or the new one, never half; if there was an error, the old one.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # other processes have theirs
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
