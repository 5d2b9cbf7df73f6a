"""What a training run is decided by, and the recipes that have a name."""

import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from chansel_jax.conv import SHARE
from chansel_jax.counting import count_network
from chansel_jax.factorize import take_factors
from chansel_jax.networks.resnet import (
    CONVS,
    PRESETS,
    Model,
    Replaced,
    ResNet,
    ResNetConfig,
)
from chansel_jax.training.augmentation import Augmentation
from chansel_jax.training.optimizer import OptimizerSettings
from experiments.cli.errors import CommandError
from experiments.cli.flags import check_different
from experiments.cluster.joining import ClusterSettings

Conv = Literal["chansel", "subspace", "subkernel"]

FORMER_NAMES = {"init": "initialiser"}  # of settings of the network
LONGEST_NAME = 100  # bytes of a run's default name, before the digest of longer ones
MOST_WORKERS = 1024
LARGEST_IMAGE = 16_384  # pixels each way

INITIALISERS = {
    "he": None,
    # Variance 1 / (3 · fan_in), uniform: `torch.nn.Linear` and `torch.nn.Conv2d`.
    "torch": nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
    "spectral": None,  # `initial_network` makes it of He's dense kernels
}


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """The network."""

    model: Model = "resnet14"
    """resnet14 is the original's network for small images. resnet18, resnet34 and resnet50 are
    torchvision's, for images of 224 × 224. The others are residual and wide residual networks for
    small images, built as the package bsconv builds its own, with their depth and the factor of
    their width."""
    blocks: tuple[int, ...] = ()
    """The stages have these numbers of residual blocks; by default they are the model's own."""
    width: int | None = None
    """The first stage has this many channels, by default as many as the model's own."""
    stem: Literal["plain", "small", "pooled"] | None = None
    """The network begins with a 3 × 3 convolution with bias, with one with BatchNorm, or with a
    7 × 7 one of stride 2, BatchNorm and max pooling; by default as the model does."""
    replaced: Replaced | None = None
    """These convolutions are --conv, and the others are ordinary ones: all but a plain stem's, of
    them those that are not 1 × 1, or those of 3 × 3 alone, as in the package bsconv; by default
    they are the model's own."""
    rank: int = 1
    """Each 3 × 3 convolution adds up this many channel selections, 1 to 9."""
    ranks: tuple[int, ...] = ()
    """These are, in place of --rank, the ranks of the 3 × 3 convolutions in the network's order;
    0 is a dense one."""
    share: float = SHARE
    """With --conv=subspace the subspace has this share of the channels, but at least 4 of them."""
    norm: bool = False
    """BatchNorm stands between the parts of channel selection."""
    use_bias: bool = False
    """The convolutions have a bias before BatchNorm."""
    input_norm: bool = False
    """BatchNorm normalises the images; in the models of the package bsconv (cifar_...) it always
    does."""
    initialiser: Literal["he", "torch", "spectral"] = "he"
    """The convolutions begin with He's variance, or with PyTorch's default, or channel selection
    with the leading singular vectors of dense kernels of He's variance."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The network computes in this dtype; its parameters are float32."""


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The images."""

    dataset: Literal["silhouettes", "dog_cat_bird", "cifar10", "cifar100", "folder"] = "silhouettes"
    """Silhouettes come with the installation; folder is your own tree of images; the others are
    downloaded once."""
    data_dir: Path | None = None
    """Prepared data sets are kept here, by default where tensorflow-datasets keeps them; with
    --dataset=folder it is the tree of images itself, PATH/{train,val,test}/CLASS/*.png (or train
    alone, or PATH/CLASS). The folder val may also be called validation, valid or eval."""
    image_size: int | None = None
    """Every image of a folder is resized and cropped to this many pixels each way."""
    classes: tuple[str, ...] = ()
    """Of a folder only these classes are used, in this order."""
    train_per_class: int | None = None
    """This many images of each class of a folder train the network; the others validate it, or are
    not used where the folder has images for validation."""
    split_seed: int = 0
    """This decides which images of a folder are for validation where they are not divided."""
    fold: int = 0
    """Of a folder whose images are not divided this fold is for validation. The folds 0, 1 and so
    on have no image in common; where a fifth of the images is for validation there are five."""
    train_images: int | None = None
    """Only this many of the training images are used, of each class as many, give or take one."""

    validation_images: int | None = None
    """Likewise of the validation images."""
    random_labels: bool = False
    """The training images have each other's labels, at random, which --split-seed decides: whatever
    fits them has learned them by heart."""

    def __post_init__(self):
        for name in ("train_images", "validation_images"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.image_size is not None and self.image_size > LARGEST_IMAGE:
            raise ValueError(f"image_size={self.image_size} must be at most {LARGEST_IMAGE}")


@dataclasses.dataclass(frozen=True)
class ReadingSettings:
    """How the images reach the network; it does not change the result."""

    input: Literal["memory", "streaming"] = "memory"
    """All images lie on every device, or they are read from disk as they are needed, which suits
    data sets that are too large for the memory."""
    workers: int = 2
    """With --input=streaming this many processes read and decode; with 0 the training does it in
    threads of its own."""

    def __post_init__(self):
        if not 0 <= self.workers <= MOST_WORKERS:
            raise ValueError(f"workers={self.workers} must be from 0 to {MOST_WORKERS}")


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """How the network is trained."""

    optimization: OptimizerSettings = OptimizerSettings()
    augmentation: Augmentation = Augmentation()
    epochs: int = 20
    """The training passes this many times over its images."""
    batch_size: int = 128
    """Each update is by this many images, over all devices."""
    accumulate: int = 1
    """A batch is computed in this many parts, one after the other, which takes less memory; the
    update is by the mean of their gradients. BatchNorm sees the parts."""
    label_smoothing: float = 0.0
    """This share of the target is spread over all classes; the reported losses are without it."""
    ema: float = 0.0
    """Parameters and statistics of BatchNorm are averaged over the updates, each average keeping
    this share of itself; the averages are validated, and are what other commands take. 0 averages
    nothing."""
    dropout_rate: float | None = None
    """This share of the pooled features is dropped in training; by default it is the
    model's own (0.2 in the original's network)."""

    @property
    def images_per_step(self) -> int:
        """Over all devices: a part of a batch, if gradients are accumulated."""
        return self.batch_size // self.accumulate

    def __post_init__(self):
        for name in ("epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 1)")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must be in [0, 1)")


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


@dataclasses.dataclass(frozen=True)
class Settings:
    """Trains a network on images, saves it, and reports."""

    conv: Conv = "chansel"
    """The network has channel selection (BSConv-U), the same from a subspace of the channels
    (BSConv-S), or the ordinary dense convolution."""
    network: NetworkSettings = NetworkSettings()
    data: DataSettings = DataSettings()
    reading: ReadingSettings = ReadingSettings()
    training: TrainingSettings = RECIPES["short"]
    seed: int = 0
    """This decides the initial parameters, the order of the images, augmentation and dropout."""
    init: Path | None = None
    """The training begins with the parameters of the run in this folder (its checkpoint of lowest
    validation loss), or of this .safetensors file. If the images have other classes, the classifier
    is initialised anew."""
    workdir: Path | None = None
    """The run lives in this folder; by default it is runs/DATASET-MODEL-CONV-seedSEED, with the
    recipe, and with the settings that differ from it, before the seed."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto goes on with the run in --workdir if there is one; never starts anew (an older run is
    renamed, not lost); must fails if there is none."""
    save_every_steps: int | None = None
    """The run is saved at the end of each epoch and when it is stopped, and, if this is given,
    within an epoch whenever so many steps are taken."""
    cluster: ClusterSettings = ClusterSettings()

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed={self.seed} must be in [0, 2**32)")
        if self.save_every_steps is not None and self.save_every_steps < 1:
            raise ValueError(f"save_every_steps={self.save_every_steps} must be at least 1")


def check_seeds(seeds: Sequence[int]) -> None:
    """Raises `ValueError` if there is no seed, one is none, or two are equal."""
    check_different("seeds", seeds, "seeds")
    given = ",".join(map(str, seeds))
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise ValueError(f"seeds={given} must be in [0, 2**32)")


def decisive(settings: Settings) -> dict[str, Any]:
    """What decides a run's result, as nested JSON.

    Where its files and images are does not, nor how these are read, when it is saved, and by which
    processes trained. The parameters that it begins with do, but not where they lie.
    """
    found = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    for name in ("init", "workdir", "resume", "save_every_steps", "reading", "cluster"):
        del found[name]
    del found["data"]["data_dir"]
    return found


def in_todays_names(config: Any) -> Any:
    """A run's `config.json`, in whose `settings` each has the name that it has today."""
    match config:
        case {"settings": {"network": {**network}} as settings}:
            network = {FORMER_NAMES.get(name, name): value for name, value in network.items()}
            return config | {"settings": settings | {"network": network}}
    return config


def run_name(settings: Settings) -> str:
    """The default name of a run's folder, which tells it from runs of other settings.

    After data set, network and convolution come the recipe that is nearest, what differs from it
    and from the other defaults, and the seed.
    """
    data, network = settings.data.dataset, settings.network.model
    plain = Settings(
        conv=settings.conv,
        network=NetworkSettings(model=network),
        data=DataSettings(dataset=data),
        seed=settings.seed,
    )
    changes = {
        name: _changes(decisive(dataclasses.replace(plain, training=recipe)), decisive(settings))
        for name, recipe in RECIPES.items()
    }
    recipe = min(changes, key=lambda name: len(changes[name]))
    named = [] if plain.training == RECIPES[recipe] else [recipe]
    begun = [f"init={settings.init.absolute().name}"] if settings.init else []
    parts = [data, network, settings.conv, *named, *changes[recipe], *begun, f"seed{settings.seed}"]
    name = re.sub(r"[^\w.,=+-]", "_", "-".join(parts))
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(json.dumps(decisive(settings)).encode()).hexdigest()[:8]
    return f"{name.encode()[:LONGEST_NAME].decode(errors='ignore')}-{digest}"


def title(settings: Settings) -> str:
    """What pictures of a run are called."""
    return f"{settings.data.dataset}, {settings.network.model}, {settings.conv}"


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One `name=value` for each entry of nested `now` that is another in `before`."""
    found = []
    for name, value in now.items():
        if isinstance(value, Mapping):
            found += _changes(before[name], value)
        elif value != before[name]:
            values = value if isinstance(value, list) else [value]
            found.append(f"{name}={','.join(map(str, values))}")
    return found


def network_config(settings: Settings, num_classes: int) -> ResNetConfig:
    """What `settings` decide of the network.

    Raises:
        ValueError: naming the setting that is wrong, and its value.
        CommandError: if its parameters do not fit this machine's memory.
    """
    network = settings.network
    if network.norm and settings.conv == "subkernel":
        raise ValueError("norm=True: the dense convolution has no two parts")
    if network.norm or settings.conv != "chansel":
        of_products = {
            "initialiser=spectral": network.initialiser == "spectral",
            "decay_composed=True": settings.training.optimization.decay_composed,
        }
        for given in filter(of_products.get, of_products):
            raise ValueError(f"{given} is for the convolution chansel without norm only")
    share = None if network.share == NetworkSettings.share else network.share
    if share is not None and settings.conv != "subspace":
        raise ValueError(f"share={share} is for the convolution subspace only")
    of_conv = {
        "norm": network.norm or None,
        "share": share,
        "kernel_init": INITIALISERS[network.initialiser],
    }
    of_conv = {name: value for name, value in of_conv.items() if value is not None}
    conv = CONVS[settings.conv]
    given = {
        "blocks": network.blocks or None,
        "width": network.width,
        "stem": network.stem,
        "replaced": network.replaced,
        "rank": network.ranks or network.rank,
        "use_bias": network.use_bias,
        "input_norm": network.input_norm or None,
        "dropout_rate": settings.training.dropout_rate,
        "dtype": jnp.dtype(network.dtype),
    }
    config = dataclasses.replace(
        PRESETS[network.model],
        conv=functools.partial(conv, **of_conv) if of_conv else conv,
        num_classes=num_classes,
        **{name: value for name, value in given.items() if value is not None},
    )
    parameters = sum(row.parameters for row in count_network(config, config.image_size))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * parameters > memory:
        raise CommandError(
            f"the network's {parameters:,} parameters take more than the {memory / 1e9:.0f} GB of "
            "this machine's memory: --width, --blocks and --model decide their number"
        )
    return config


def build_network(settings: Settings, num_classes: int) -> ResNet:
    """The network that `settings` describe, with some parameters: `initial_network` has theirs.

    Raises:
        ValueError: naming the setting that is wrong, and its value.
        CommandError: if its parameters do not fit this machine's memory.
    """
    return ResNet(network_config(settings, num_classes), rngs=nnx.Rngs(settings.seed))


def initial_network(settings: Settings, num_classes: int) -> ResNet:
    """The network that `settings` describe, initialised with `settings.seed`.

    Raises:
        ValueError: naming the setting that is wrong, and its value.
        CommandError: if its parameters do not fit this machine's memory.
    """
    network = build_network(settings, num_classes)
    if settings.network.initialiser == "spectral":
        take_factors(network, build_network(with_dense(settings), num_classes))
    return network


def with_dense(settings: Settings) -> Settings:
    """`settings` with the dense convolution, of which channel selection is made."""
    given = settings.network
    changes = {"rank": 1, "ranks": (), "norm": False, "share": SHARE}
    if given.initialiser == "spectral":
        changes["initialiser"] = "he"
    network = dataclasses.replace(given, **changes)
    optimization = dataclasses.replace(settings.training.optimization, decay_composed=False)
    training = dataclasses.replace(settings.training, optimization=optimization)
    return dataclasses.replace(settings, conv="subkernel", network=network, training=training)
