"""Data sets, prepared and cached through tensorflow-datasets, without TensorFlow."""

from chansel_jax.data.dataset import Dataset, Split
from chansel_jax.data.errors import DataError
from chansel_jax.data.loading import DATASETS, load
from chansel_jax.data.stored import StoredImages

__all__ = ["DATASETS", "DataError", "Dataset", "Split", "StoredImages", "load"]
