"""PyTorch's data pipeline: random crops and mirror images, made by a loader's processes."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

CROP_PADDING = 4

Batch = tuple[torch.Tensor, torch.Tensor]


class AugmentedImages(Dataset):
    """Images that are cropped at random out of their padded selves, half of them mirrored.

    The loader asks for whole batches at a time (`__getitems__`), which are cropped all at once:
    one image at a time would cost a Python call for each.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        margins = ((0, 0), (CROP_PADDING,) * 2, (CROP_PADDING,) * 2, (0, 0))
        self.padded = torch.from_numpy(np.pad(images, margins))
        self.size = images.shape[1:3]
        self.labels = torch.from_numpy(labels).long()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """`(N, C, H, W)` uint8, channels last, and `(N,)` int64."""
        index = torch.tensor(indices)
        height, width = self.size
        count = len(index)
        top, left = torch.randint(2 * CROP_PADDING + 1, (2, count, 1))
        columns = torch.arange(width).expand(count, width)
        columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns) + left
        rows = torch.arange(height) + top
        images = self.padded[index[:, None, None], rows[:, :, None], columns[:, None, :]]
        return images.permute(0, 3, 1, 2), self.labels[index]


def make_loader(
    images: np.ndarray, labels: np.ndarray, batch_size: int, *, workers: int, pin_memory: bool
) -> DataLoader:
    """Whole batches in a new random order each epoch; the processes stay between epochs."""
    return DataLoader(
        AugmentedImages(images, labels),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        collate_fn=_as_it_is,
    )


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Images `(N, C, H, W)` uint8 as float32 of zero mean and unit deviation in each channel."""
    return (images.float() - mean[:, None, None]) / std[:, None, None]


def _as_it_is(batch: Batch) -> Batch:
    return batch
