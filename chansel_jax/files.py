"""Files that are written as a whole, or not at all."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes `content` as indented JSON; a reader sees the old file or the new one, never half."""
    with replaced(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
