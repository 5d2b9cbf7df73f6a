"""What a training run is decided by, and the recipes that have a name."""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from chansel_jax.networks.resnet import CONVS, PRESETS, Model, ResNet
from chansel_jax.training.augmentation import Augmentation
from chansel_jax.training.optimizer import OptimizerSettings
from experiments.cluster.joining import ClusterSettings

Conv = Literal["chansel", "subkernel"]

INITIALISERS = {
    "he": None,
    # Variance 1 / (3 · fan_in), uniform: `torch.nn.Linear` and `torch.nn.Conv2d`.
    "torch": nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
}


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """The network."""

    model: Model = "resnet14"
    """The original's network for small images, or torchvision's ResNet-18."""
    blocks: tuple[int, ...] = ()
    """The stages have these numbers of residual blocks; by default they are the model's own."""
    width: int | None = None
    """Channels of the first stage; by default the model's own (16, 64)."""
    rank: int = 1
    """Channel selections that are added up in each 3 × 3 convolution, 1 to 9."""
    ranks: tuple[int, ...] = ()
    """In place of --rank, that of each 3 × 3 convolution, in the network's order."""
    norm: bool = False
    """Whether there is BatchNorm between the two parts of channel selection."""
    use_bias: bool = False
    """Whether convolutions have a bias before BatchNorm."""
    init: Literal["he", "torch"] = "he"
    """Initial parameters of the convolutions: He's variance, or PyTorch's default."""
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
    train_images: int | None = None
    """Train on this many of the training images only, as many of each class as can be."""

    def __post_init__(self):
        if self.train_images is not None and self.train_images < 1:
            raise ValueError(f"train_images={self.train_images} must be at least 1")


@dataclasses.dataclass(frozen=True)
class InputSettings:
    """How the images reach the network; it does not change the result."""

    input: Literal["memory", "streaming"] = "memory"
    """All on every device; or read from disk as they are needed, where memory is too small."""
    workers: int = 2
    """streaming: processes that read and decode; 0 does so in threads of the training's."""

    def __post_init__(self):
        if self.workers < 0:
            raise ValueError(f"workers={self.workers} must not be negative")


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How the network is trained."""

    optimization: OptimizerSettings = OptimizerSettings()
    augmentation: Augmentation = Augmentation()
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 128
    """Images an update, over all devices."""
    accumulate: int = 1
    """Compute a batch in as many parts, one after the other, for less memory; the update is by the
    mean of their gradients. BatchNorm sees the parts."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes; the reported losses are without it."""
    dropout_rate: float | None = None
    """Share of the pooled features dropped in training; by default the model's own (0.2, 0)."""

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 1)")


RECIPES = {
    "short": TrainingSettings(),
    # Its epochs, dropout and batches; its optimiser is not known.
    "original": TrainingSettings(epochs=100),
    "best": TrainingSettings(
        optimization=OptimizerSettings(optimizer="muon", learning_rate=2e-2, warmup_fraction=0.1),
        augmentation=Augmentation(cutout=12),
        epochs=60,
        label_smoothing=0.1,
        dropout_rate=0.0,
    ),
}
"""Values of all `TrainingSettings`, by the name that `--recipe` takes."""


def with_epochs(recipe: TrainingSettings, epochs: int) -> TrainingSettings:
    """`recipe` in as many epochs."""
    return dataclasses.replace(recipe, epochs=epochs)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains a network on images, saves it, and reports."""

    conv: Conv = "chansel"
    """Channel selection, or the ordinary dense convolution."""
    network: NetworkSettings = NetworkSettings()
    data: DataSettings = DataSettings()
    input: InputSettings = InputSettings()
    training: TrainingSettings = RECIPES["short"]
    seed: int = 0
    """Decides initial parameters, order, augmentation and dropout."""
    workdir: Path | None = None
    """The run's folder; by default runs/DATASET-MODEL-CONV-seedSEED."""
    resume: Literal["auto", "never", "must"] = "auto"
    """Go on with the run in --workdir if there is one; start anew (an older run is renamed, not
    lost); or fail if there is none."""
    save_every_steps: int | None = None
    """Save after as many steps within an epoch too, not at its end and when stopped only."""
    cluster: ClusterSettings = ClusterSettings()

    def __post_init__(self):
        checked_seed(self.seed)
        if self.save_every_steps is not None and self.save_every_steps < 1:
            raise ValueError(f"save_every_steps={self.save_every_steps} must be at least 1")


def checked_seed(seed: int) -> int:
    """`seed`, if it is one.

    Raises:
        ValueError: if it is negative or has more than 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed} must be in [0, 2**32)")
    return seed


def checked_seeds(seeds: Sequence[int]) -> Sequence[int]:
    """`seeds`, if there are any and all differ.

    Raises:
        ValueError: if not, or if one is none.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={','.join(map(str, seeds))} must be different, one at least")
    for seed in seeds:
        checked_seed(seed)
    return seeds


def decisive(settings: Settings) -> dict[str, Any]:
    """What decides a run's result, as nested JSON.

    Where its files and images are does not, nor how these are read, when it is saved, and by which
    processes trained.
    """
    found = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    for name in ("workdir", "resume", "save_every_steps", "input", "cluster"):
        del found[name]
    del found["data"]["data_dir"]
    return found


def run_name(settings: Settings) -> str:
    """The default name of a run's folder."""
    model = settings.network.model
    return f"{settings.data.dataset}-{model}-{settings.conv}-seed{settings.seed}"


def build_network(settings: Settings, num_classes: int) -> ResNet:
    """The network that `settings` describe, initialised with `settings.seed`.

    Raises:
        ValueError: naming the setting that is wrong, and its value.
    """
    network = settings.network
    given = {
        "blocks": network.blocks or None,
        "width": network.width,
        "rank": network.ranks or network.rank,
        "use_bias": network.use_bias,
        "dropout_rate": settings.training.dropout_rate,
        "dtype": jnp.dtype(network.dtype),
    }
    config = dataclasses.replace(
        PRESETS[network.model],
        conv=_convolution(settings.conv, network),
        num_classes=num_classes,
        **{name: value for name, value in given.items() if value is not None},
    )
    return ResNet(config, rngs=nnx.Rngs(settings.seed))


def _convolution(conv: Conv, network: NetworkSettings) -> Callable[..., nnx.Module]:
    given = {}
    if network.norm:
        if conv == "subkernel":
            raise ValueError("norm=True: the dense convolution has no two parts")
        given["norm"] = True
    if INITIALISERS[network.init] is not None:
        given["kernel_init"] = INITIALISERS[network.init]
    return functools.partial(CONVS[conv], **given) if given else CONVS[conv]
