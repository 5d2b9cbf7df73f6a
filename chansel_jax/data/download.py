"""Downloads one file, once, and keeps it only if it is what was asked for."""

import hashlib
import tempfile
from pathlib import Path

import requests
from rich.progress import DownloadColumn

from chansel_jax.data.errors import DataError
from chansel_jax.data.terminal import progress_bar

# tensorflow-datasets' own download manager is not used: without a network it repeats itself for
# more than three minutes, it cannot be interrupted, and a refused file stays behind. Nor is pooch
# (1.9): it prints what it does, its files can be read by their owner alone, it leaves connections
# open after an HTTP error, and it does not resume a partial download either.

TIMEOUT = 30  # seconds without a byte
BLOCK = 1 << 20


def download(url: str, sha256: str, folder: Path) -> Path:
    """Downloads a file into `folder`, unless it is there already, undamaged.

    Args:
        url: http or https.
        sha256: the checksum of the file, in hexadecimal.
        folder: is made if it is not there.

    Returns:
        The path of the file; its checksum is right.

    Raises:
        DataError: no connection, an HTTP error, or another checksum. Nothing is kept then.
    """
    path = folder / f"{sha256[:16]}-{url.rpartition('/')[2]}"
    if path.exists() and _checksum(path) == sha256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    # Beside the final path, so that moving it there is one atomic step.
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=folder) as scratch:
        partial = Path(scratch, path.name)
        try:
            with (
                requests.get(url, stream=True, timeout=TIMEOUT) as response,
                partial.open("wb") as file,
            ):
                response.raise_for_status()
                total = int(response.headers.get("Content-Length", 0)) or None
                with progress_bar(path.name, total, DownloadColumn()) as advance:
                    for block in response.iter_content(BLOCK):
                        advance(file.write(block))
        except requests.RequestException as error:
            raise DataError(f"cannot download {url}: {error}") from error
        if (received := _checksum(partial)) != sha256:
            raise DataError(
                f"{url} is not the expected file: its SHA-256 is {received}, not {sha256}"
            )
        partial.replace(path)
    return path


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
