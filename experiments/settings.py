"""The settings of a training run, and what they name."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
from flax import nnx

from chansel_jax.optimizer import OptimizerSettings
from chansel_jax.resnet import CONVS, PRESETS, ResNet
from chansel_jax.training import Augmentation


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """The network."""

    conv: Literal["chansel", "subkernel"] = "chansel"
    """Channel selection, or the ordinary dense convolution."""
    model: Literal["resnet14", "resnet18"] = "resnet14"
    """The original's network for small images, or torchvision's ResNet-18."""
    width: int | None = None
    """Channels of the first stage; by default the model's own (16, 64)."""
    rank: int = 1
    """Channel selections that are added up in each 3 × 3 convolution, 1 to 9."""
    use_bias: bool = False
    """Whether convolutions have a bias before BatchNorm."""
    dropout_rate: float | None = None
    """Share of the pooled features dropped in training; by default the model's own (0.2, 0)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the parameters are float32."""


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The images."""

    dataset: Literal["silhouettes", "dog_cat_bird", "cifar10", "cifar100", "folder"] = "silhouettes"
    """Silhouettes come with the installation; folder is your own tree of images; the others are
    downloaded once."""
    data_dir: Path | None = None
    """Where prepared data sets are kept (default: TFDS's own); with --dataset=folder the tree
    itself, PATH/{train,validation,test}/CLASS/*.png (or train alone, or PATH/CLASS)."""
    image_size: int | None = None
    """folder: resize and crop every image to this many pixels each way."""
    classes: tuple[str, ...] = ()
    """folder: use these classes only, in this order."""
    train_per_class: int | None = None
    """folder: train on this many images of each class; the rest are for validation."""
    split_seed: int = 0
    """folder: decides which images are for validation where no folder does."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains a network on images, saves it, and reports."""

    network: NetworkSettings = NetworkSettings()
    data: DataSettings = DataSettings()
    optimization: OptimizerSettings = OptimizerSettings()
    augmentation: Augmentation = Augmentation()
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images a step, over all devices."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes; the reported losses are without it."""
    seed: int = 0
    """Decides initial parameters, order, augmentation and dropout."""
    workdir: Path | None = None
    """The run's folder; by default runs/DATASET-MODEL-CONV-seedSEED."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on with the run in --workdir if there is one; start anew (an older run is renamed, not
    lost); or fail if there is none."""

    def __post_init__(self):
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 1)")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32)")


def run_name(settings: Settings) -> str:
    """The default name of a run's folder."""
    network = settings.network
    return f"{settings.data.dataset}-{network.model}-{network.conv}-seed{settings.seed}"


def build_network(settings: Settings, num_classes: int) -> ResNet:
    """The network that `settings.network` describe, initialised with `settings.seed`."""
    network = dataclasses.asdict(settings.network)
    preset, conv = PRESETS[network.pop("model")], CONVS[network.pop("conv")]
    given = {name: value for name, value in network.items() if value is not None}
    given["dtype"] = jnp.dtype(given["dtype"])
    return preset(conv, num_classes, **given, rngs=nnx.Rngs(settings.seed))
