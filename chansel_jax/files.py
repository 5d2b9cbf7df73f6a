"""Files that are written as a whole, or not at all; JSON."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def is_address(path: str) -> bool:
    """Whether `path` is an address, as `gs://bucket/run`, rather than one of a file or folder."""
    return re.match(r"[A-Za-z][\w+.-]*:/", path) is not None


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file beside `path`, to be written within a `with`; in its end it takes the place of `path`.

    A reader sees the old file or the new one, never half; if there was an error, the old one. So
    it is after a loss of power: the content is on the disk before the name is. Where `path` is a
    link it stays one, and a device or a pipe takes what is written.

    Raises:
        OSError: that names `path`.
    """
    path, asked = Path(os.path.realpath(path)), path
    is_place = path.exists() and not (path.is_file() or path.is_dir())
    folder = Path(tempfile.gettempdir()) if is_place else path.parent
    partial = folder / f"{path.name}.{os.getpid()}.partial"  # other processes have theirs
    try:
        yield partial
        if is_place:
            path.write_bytes(partial.read_bytes())
            return
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno and error.filename in (None, str(partial)):  # as of a full disk
            raise OSError(error.errno, error.strerror, str(asked)) from error
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as indented JSON; a reader sees the old file or the new one, never half."""
    with replaced(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """What `path` holds, which is JSON.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no JSON.
    """
    return parse_json(path.read_bytes())


def parse_json(text: bytes | str) -> Any:
    """What JSON says.

    Raises:
        ValueError: for all that is none, nests too deeply, or has a name twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_of_different_names)
    except RecursionError as error:
        raise ValueError("its brackets nest too deeply") from error


def _of_different_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is given twice")
    return found
