"""The settings of a benchmark."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from chansel_jax.networks.resnet import CONVS, Model
from experiments.benchmarking.cases import Conv, Dtype, LayerShape, TorchVariant, What

SHAPE_FORMAT = "SIZExC_INxC_OUTxKERNELxSTRIDE"

# Settings that have a meaning with one --what only.
ONLY_WITH = {
    "shapes": "layer",
    "images": "epoch",
    "runs": "epoch",
    "epochs": "epoch",
    "loader_workers": "epoch",
}


@dataclasses.dataclass(frozen=True)
class ImageSettings:
    """The images of --what=epoch; everything else takes random ones."""

    dataset: Literal["silhouettes", "dog_cat_bird", "cifar10", "cifar100", "folder"] = "silhouettes"
    """As in experiments.train."""
    data_dir: Path | None = None
    """As in experiments.train."""
    classes: tuple[str, ...] = ()
    """folder: use these classes only."""
    train_per_class: int | None = None
    """folder: train on this many images of each class."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times JAX and PyTorch side by side: one network, one set of weights, interleaved rounds."""

    images: ImageSettings = ImageSettings()
    what: What = "step"
    """A training step; a forward pass in evaluation; single layers; or whole epochs of training
    with the data pipeline."""
    model: Model = "resnet14"
    """The original's network for small images, or torchvision's ResNet-18."""
    batch_size: int | None = None
    """Images a step; by default 128, and with ResNet-18 64 on a GPU and 16 on a CPU."""
    image_size: int | None = None
    """Pixels each way; by default 32, with ResNet-18 224. --what=epoch takes the data set's, and
    resizes those of --dataset=folder."""
    shapes: tuple[str, ...] = ()
    """--what=layer: the layers, each SIZExC_INxC_OUTxKERNELxSTRIDE as in 32x16x16x3x1; by default
    the convolutions of the model."""
    dtypes: tuple[Dtype, ...] = ()
    """Of the computation; by default float32, and on GPUs all three. float32 forbids TF32, tf32
    allows it, bfloat16 has parameters in float32."""
    convs: tuple[Conv, ...] = ("chansel", "subkernel")
    """Channel selection, the ordinary dense convolution, or both."""
    lowerings: tuple[str, ...] | None = None
    """Lowerings of JAX's layers, of each convolution those that it has; by default all, with
    --what=epoch the default one."""
    torch: tuple[TorchVariant, ...] | None = None
    """Variants of PyTorch; by default all that the device has. Empty (--torch=) for JAX alone."""
    rounds: int = 20
    """How often each contestant is timed."""
    round_seconds: float = 0.2
    """Time at least so many steps a round as fill this, one at least."""
    runs: int = 5
    """--what=epoch: trainings from the beginning."""
    epochs: int = 10
    """--what=epoch: epochs of each training; an epoch is a round."""
    cpu_devices: int = 1
    """On CPUs: virtual devices that JAX shards the batch over."""
    loader_workers: int | None = None
    """--what=epoch: processes that load PyTorch's batches; by default one a core, 8 at most, and
    on CPUs none, which is the fastest there: they would take the cores that the network needs."""
    seed: int = 0
    """Decides weights, batches and the order of contestants in a round."""
    output: Path | None = None
    """Folder of results.json, results.md and chart.png, which are replaced; by default
    benchmarks/WHAT-MODEL-DEVICE."""

    def __post_init__(self):
        for name in ("batch_size", "image_size", "rounds", "runs", "epochs", "cpu_devices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.loader_workers is not None and self.loader_workers < 0:
            raise ValueError(f"loader_workers={self.loader_workers} must not be negative")
        if not (math.isfinite(self.round_seconds) and self.round_seconds > 0):
            raise ValueError(f"round_seconds={self.round_seconds} must be positive")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32)")
        if not self.convs:
            raise ValueError("convs= must name at least one convolution")
        known = dict.fromkeys(name for conv in CONVS.values() for name in conv.LOWERINGS)
        unknown = set(self.lowerings or ()) - set(known)
        if unknown:
            raise ValueError(
                f"lowerings={','.join(self.lowerings)} may name {', '.join(known)} only"
            )
        for shape in self.shapes:
            parse_shape(shape)
        for field in dataclasses.fields(self):
            only = ONLY_WITH.get(field.name, self.what)
            if only != self.what and getattr(self, field.name) != field.default:
                value = _named(field.name, getattr(self, field.name))
                raise ValueError(f"{value} has no meaning with what={self.what}, only with {only}")


def _named(name: str, value: object) -> str:
    """A setting as it was given; of a group, what is not as by default."""
    if not dataclasses.is_dataclass(value):
        return f"{name}={','.join(value) if isinstance(value, tuple) else value}"
    given = [f for f in dataclasses.fields(value) if getattr(value, f.name) != f.default]
    return ", ".join(_named(field.name, getattr(value, field.name)) for field in given)


def parse_shape(text: str) -> LayerShape:
    """A layer from five numbers with an x between them.

    Raises:
        ValueError: if it is none, or has no output.
    """
    fields = text.split("x")
    if len(fields) != 5 or not all(field.isdecimal() and int(field) for field in fields):
        raise ValueError(f"shapes={text} must be {SHAPE_FORMAT}, each at least 1")
    shape = LayerShape(*map(int, fields))
    if shape.output_size < 1:
        raise ValueError(f"shapes={text}: the kernel is larger than the padded image")
    return shape
