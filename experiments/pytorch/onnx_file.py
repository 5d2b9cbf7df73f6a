"""A trained network as an ONNX file, by way of the same network in PyTorch."""

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from chansel_jax.networks.resnet import ResNet
from chansel_jax.torch_weights import to_torch
from experiments.pytorch.networks import torch_twin


class Classifier(nn.Module):
    """From images `(N, H, W, 3)` uint8 to probabilities `(N, classes)` float32.

    Args:
        network: from normalised images `(N, 3, H, W)` to logits.
        mean: `(3,)`, the channels' means, from 0 to 255.
        std: `(3,)`, their standard deviations.
    """

    def __init__(self, network: nn.Module, mean: np.ndarray, std: np.ndarray):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.from_numpy(np.float32(mean)))
        self.register_buffer("std", torch.from_numpy(np.float32(std)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = (images.float() - self.mean) / self.std
        return torch.softmax(self.network(x.permute(0, 3, 1, 2)), dim=1)


def save_onnx(
    network: ResNet,
    kind: str,
    path: Path,
    *,
    image_shape: Sequence[int],
    mean: np.ndarray,
    std: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Writes a `Classifier` with the parameters of `network`, for images in any number.

    Args:
        network: a trained one.
        kind: of its convolutions, as of `torch_twin`.
        path: of the file.
        image_shape: `(H, W, 3)`.
        mean: as of `Classifier`.
        std: likewise.
        class_names: of the logits; the file holds them as JSON, in its metadata `class_names`.

    Raises:
        OSError: if the file cannot be written.
    """
    twin = torch_twin(kind, network.config)
    twin.load_state_dict(to_torch(network))
    classifier = Classifier(twin, mean, std).eval()
    # Two images: a size of one would be taken for a constant.
    images = torch.zeros((2, *image_shape), dtype=torch.uint8)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            classifier,
            (images,),
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes={"images": {0: torch.export.Dim("n")}},
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props["class_names"] = json.dumps(list(class_names))
    program.save(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it, PyTorch does not warn of its own code, nor of packages that nothing here needs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
