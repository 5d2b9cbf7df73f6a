"""Stands before PyTorch in processes that can do without it."""

raise ImportError("PyTorch is kept out of this process")
