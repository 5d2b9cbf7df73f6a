"""The settings of a benchmark."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

from chansel_jax.networks.resnet import CONVS, Model
from experiments.benchmarking.cases import Dtype, LayerShape, TorchVariant, What, conv_and_width
from experiments.cli.flags import check_different

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
    """--what=epoch takes these images; everything else takes random ones."""

    dataset: Literal["silhouettes", "dog_cat_bird", "cifar10", "cifar100", "folder"] = "silhouettes"
    """This data set is used, as by experiments.train."""
    data_dir: Path | None = None
    """It is found here, as by experiments.train."""
    classes: tuple[str, ...] = ()
    """Of a folder only these classes are used."""
    train_per_class: int | None = None
    """Of a folder this many images of each class are trained on."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Times JAX and PyTorch side by side: one network, one set of weights, interleaved rounds."""

    images: ImageSettings = ImageSettings()
    what: What = "step"
    """What is timed is a training step, a forward pass in evaluation, single layers, or whole
    epochs of training with the data pipeline."""
    model: Model = "resnet14"
    """The network is the original's for small images (resnet14), torchvision's (resnet18, resnet34,
    resnet50), or a residual or wide residual network of the package bsconv for small images."""
    batch_size: int | None = None
    """A step takes this many images; by default 128, or for a network for images of 224 × 224 64 on
    a GPU and 16 on a CPU."""
    image_size: int | None = None
    """Images have this many pixels each way; by default as many as the model was made for.
    --what=epoch takes those of the data set as they are, and resizes those of --dataset=folder."""
    shapes: tuple[str, ...] = ()
    """With --what=layer these layers are timed, each SIZExC_INxC_OUTxKERNELxSTRIDE as in
    32x16x24x3x1, a kernel of 3 × 3 at stride 1 from 16 to 24 channels on images of 32 × 32; by
    default they are the convolutions of the model."""
    dtypes: tuple[Dtype, ...] = ()
    """All is computed in each of these; by default in float32, and on GPUs in all three. float32
    forbids TF32, tf32 allows it, bfloat16 keeps the parameters in float32."""
    convs: tuple[str, ...] = ("chansel", "subkernel")
    """Networks with channel selection, the ordinary dense convolution, or both are timed. A name
    with a width, as chansel-w32, has so many channels in the first stage."""
    lowerings: tuple[str, ...] | None = None
    """JAX's layers are timed in these lowerings, each convolution in those that it has; by default
    in all, with --what=epoch in the default one."""
    torch: tuple[TorchVariant, ...] | None = None
    """These variants of PyTorch are timed; by default all that the device has. With --torch= JAX is
    timed alone."""
    rounds: int = 20
    """Each contestant is timed so many times."""
    round_seconds: float = 0.2
    """A round has so many steps that they fill these seconds, and at least one."""
    runs: int = 5
    """With --what=epoch there are this many trainings from the beginning."""
    epochs: int = 10
    """With --what=epoch each training has this many epochs; an epoch is a round."""
    cpu_devices: int = 1
    """On CPUs, JAX shards the batch over this many virtual devices."""
    loader_workers: int | None = None
    """With --what=epoch this many processes load PyTorch's batches; by default one a core, 8 at
    most, and on CPUs none, which is the fastest there: they would take the cores that the network
    needs."""
    seed: int = 0
    """This decides weights, batches and the order of contestants in a round."""
    output: Path | None = None
    """results.json, results.md and chart.png are written to this folder, where they are replaced;
    by default it is benchmarks/WHAT-MODEL-DEVICE."""

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
        check_different("convs", self.convs, "convolutions")
        for conv in self.convs:
            _, width = conv_and_width(conv)
            if width and self.what == "layer":
                raise ValueError(f"convs={conv} has no meaning with what=layer: layers have shapes")
        for name in ("shapes", "dtypes", "lowerings", "torch"):
            check_different(name, getattr(self, name) or ())
        if self.lowerings == self.torch == ():
            raise ValueError("lowerings= and torch= leave nothing to be timed")
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


def parse_shape(text: str, argument: str = "shapes") -> LayerShape:
    """A layer from five numbers with an x between them, as `argument` has them.

    Raises:
        ValueError: if it is none, or its kernel is larger than the image.
    """
    fields = text.split("x")
    if len(fields) != 5 or not all(field.isdecimal() and int(field) for field in fields):
        raise ValueError(f"{argument}={text} must be {SHAPE_FORMAT}, each at least 1")
    if any(len(field) > 6 for field in fields):
        raise ValueError(f"{argument}={text} must be {SHAPE_FORMAT}, each below a million")
    shape = LayerShape(*map(int, fields))
    if shape.kernel_size > shape.size:
        raise ValueError(
            f"{argument}={text}: the kernel of {shape.kernel_size} × {shape.kernel_size} is larger "
            f"than the image of {shape.size} × {shape.size}; a shape is {SHAPE_FORMAT}"
        )
    return shape
