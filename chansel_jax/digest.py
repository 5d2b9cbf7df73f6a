"""SHA-256 of arrays: whether two are equal, told from 64 characters."""

import hashlib
from typing import Any

import jax
import numpy as np


def digest(tree: Any) -> str:
    """SHA-256, in hexadecimal, of a tree's arrays: their paths, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        sha.update(header(jax.tree_util.keystr(path), array.dtype, array.shape))
        sha.update(array.tobytes())
    return sha.hexdigest()


def header(path: str, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What `digest` takes in before an array's bytes."""
    return f"{path} {dtype} {shape}\n".encode()
