"""Pictures of what one network gets wrong, and of what it has learned."""

from collections.abc import Sequence

import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from chansel_jax.conv import ChannelSelectionConv
from chansel_jax.training.prediction import Scores
from experiments.reporting.plots import drawable

MOST_MISTAKES = 24
MOST_KERNELS = 32  # of a layer
COLUMNS = 8


def mistakes(
    images: np.ndarray, labels: np.ndarray, scores: Scores, class_names: Sequence[str]
) -> Figure | None:
    """The images whose own class had the lowest probabilities, the lowest first.

    Args:
        images: `(N, H, W, 3)` uint8.
        labels: `(N,)`.
        scores: of these images.
        class_names: by label.

    Returns:
        The picture; None if no image is taken for another class.
    """
    wrong = np.flatnonzero(scores.predictions != labels)
    worst = wrong[np.argsort(scores.probabilities[wrong], kind="stable")][:MOST_MISTAKES]
    if not len(worst):
        return None
    names, families = drawable(class_names)
    rows = -(-len(worst) // COLUMNS)
    picture = Figure(figsize=(1.5 * COLUMNS, 2 * rows), layout="constrained")
    grid = picture.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axes in grid:
        axes.axis("off")
    for axes, image in zip(grid, worst, strict=False):
        axes.imshow(images[image])
        taken_for, own = names[scores.predictions[image]], names[labels[image]]
        text = f"{own}: {scores.probabilities[image]:.1%}\ntaken for {taken_for}"
        axes.set_title(text, fontsize=8, fontfamily=families, parse_math=False)
    return picture


def kernels(network: nnx.Module) -> Figure | None:
    """The depthwise kernels of every channel selection, a row a layer.

    Of a layer those of the first output channels are shown, and of them those of the first rank.
    Each is divided by its largest magnitude: red is positive, blue negative.

    Returns:
        The picture; None if no layer has a kernel of two axes and more than one element.
    """
    layers = {
        ".".join(map(str, path)): np.asarray(layer.depthwise[...], np.float32)[..., 0, :]
        for path, layer in nnx.iter_graph(network)
        if isinstance(layer, ChannelSelectionConv)
        and len(layer.kernel_size) == 2
        and max(layer.kernel_size) > 1
    }
    if not layers:
        return None
    picture = Figure(figsize=(9, 0.4 * len(layers) + 0.3), layout="constrained")
    for axes, (name, kernel) in zip(
        picture.subplots(len(layers), 1, squeeze=False).ravel(), layers.items(), strict=True
    ):
        axes.imshow(_side_by_side(kernel[..., :MOST_KERNELS]), cmap="RdBu_r", vmin=-1, vmax=1)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axes.set(xticks=[], yticks=[], frame_on=False)
        axes.set_anchor("W")
    return picture


def _side_by_side(kernels: np.ndarray) -> np.ndarray:
    """Kernels `(H, W, C)` as one image, each with a column of its own behind it left empty."""
    largest = np.maximum(np.abs(kernels).max(axis=(0, 1)), np.finfo(np.float32).tiny)
    apart = np.pad(kernels / largest, ((0, 0), (0, 1), (0, 0)), constant_values=np.nan)
    return apart.transpose(0, 2, 1).reshape(len(kernels), -1)
