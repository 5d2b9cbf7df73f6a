"""What settings come to on a machine: cases, and the contestants of each."""

import dataclasses
from collections.abc import Sequence
from typing import Any, get_args

from flax import nnx

from chansel_jax import data
from chansel_jax.conv import unwrapped
from chansel_jax.errors import OneLineError
from chansel_jax.networks.resnet import CONVS, PRESETS
from chansel_jax.training.optimizer import OptimizerSettings
from experiments.benchmarking.cases import (
    Case,
    Contestant,
    Dtype,
    LayerShape,
    Machine,
    Recipe,
    Task,
    TorchVariant,
    TrainImages,
    conv_and_width,
)
from experiments.benchmarking.contestants.weights import make_weights
from experiments.benchmarking.rounds import Schedule
from experiments.benchmarking.settings import Settings, parse_shape
from experiments.benchmarking.work import network_config

# By the pixels that a model is made for.
BATCH_SIZES = {32: {"cpu": 128, "gpu": 128}, 224: {"cpu": 16, "gpu": 64}}
# Lowerings of JAX and variants of PyTorch that exist on one platform only.
PLATFORMS = {"native": "cpu", "composed_native": "cpu", "max_autotune": "gpu"}
MOST_LOADER_WORKERS = 8


class PlanError(OneLineError):
    """Settings that come to nothing on this machine."""


def make_machine(settings: Settings, platform: str, cores: int) -> Machine:
    """What contestants run on: every core this process may use.

    Raises:
        PlanError: if it is neither a CPU nor a GPU, on which PyTorch could be compared.
    """
    if platform not in ("cpu", "gpu"):
        raise PlanError(f"JAX computes on a {platform}; CPUs and GPUs can be timed (JAX_PLATFORMS)")
    workers = settings.loader_workers
    if workers is None:
        # On CPUs, the original's epoch took 7.3 s without, 7.7 s with one for each of two cores.
        workers = 0 if platform == "cpu" else min(cores, MOST_LOADER_WORKERS)
    return Machine(platform, cores, settings.cpu_devices, workers)


def make_cases(
    settings: Settings, machine: Machine, train_images: TrainImages | None
) -> list[Case]:
    """What is timed, one case after the other.

    Raises:
        PlanError: if a dtype or the batch size does not fit the machine or the data.
    """
    preset = PRESETS[settings.model]
    batch_size = settings.batch_size or BATCH_SIZES[preset.image_size][machine.platform]
    _check_batch_size(batch_size, machine, train_images)
    image_size, num_classes = settings.image_size or preset.image_size, preset.num_classes
    if train_images is not None:
        image_size, num_classes = train_images.images.shape[1], int(train_images.labels.max()) + 1
    base = Case(
        what=settings.what,
        model=settings.model,
        batch_size=batch_size,
        image_size=image_size,
        num_classes=num_classes,
        dtype="float32",
        seed=settings.seed,
    )
    cases = [dataclasses.replace(base, dtype=dtype) for dtype in make_dtypes(settings, machine)]
    if settings.what != "layer":
        return cases
    layers = [parse_shape(shape) for shape in settings.shapes] or model_shapes(base)
    return [
        dataclasses.replace(case, layer=layer, backward=backward)
        for case in cases
        for backward in (False, True)
        for layer in layers
    ]


def make_dtypes(settings: Settings, machine: Machine) -> tuple[Dtype, ...]:
    """Those asked for, or those of the machine.

    Raises:
        PlanError: if the machine has none of one.
    """
    gpu = machine.platform == "gpu"
    if "tf32" in settings.dtypes and not gpu:
        raise PlanError("dtypes=tf32: TF32 exists on GPUs only, and JAX sees none")
    return settings.dtypes or (get_args(Dtype) if gpu else ("float32",))


def make_contestants(settings: Settings, machine: Machine, has_torch: bool) -> list[Contestant]:
    """Those of each convolution, PyTorch's eager one first: the others are compared with it.

    Raises:
        PlanError: if there are none.
    """
    variants = settings.torch
    if variants is None:
        variants = [name for name in get_args(TorchVariant) if runs_on(name, machine)]
    contestants = []
    for conv in settings.convs:
        if has_torch:
            contestants += [Contestant("PyTorch", conv, variant) for variant in variants]
        own = make_lowerings(conv, settings, machine)
        contestants += [Contestant("JAX", conv, variant) for variant in own]
    if not contestants:
        raise PlanError("there is nothing to time: no lowering, no variant of PyTorch")
    return contestants


def make_lowerings(conv: str, settings: Settings, machine: Machine) -> list[str]:
    """Those of a convolution in JAX: those asked for that it has, all, or for epochs the default.

    Where it has none of those that are asked for, it is compared in its default one.
    """
    default, kind = [default_lowering(conv)], _kind(conv)
    if settings.lowerings == ():
        return []
    if settings.lowerings is not None:
        chosen = [name for name in settings.lowerings if name in kind.LOWERINGS]
        return chosen or default
    if settings.what == "epoch":
        return default
    return [name for name in kind.LOWERINGS if runs_on(name, machine)]


def runs_on(variant: str, machine: Machine) -> bool:
    """Whether a lowering of JAX or a variant of PyTorch exists on `machine`."""
    return PLATFORMS.get(variant, machine.platform) == machine.platform


def make_tasks(
    case: Case,
    contestants: Sequence[Contestant],
    machine: Machine,
    train_images: TrainImages | None,
) -> list[Task]:
    """The contestants of `case` with what they need; those of a convolution share weights."""
    defaults = OptimizerSettings()
    recipe = Recipe(defaults.learning_rate, defaults.weight_decay)
    weights = {conv: make_weights(case, conv) for conv in {c.conv for c in contestants}}
    return [
        Task(
            case,
            contestant,
            machine,
            recipe,
            weights[contestant.conv],
            torch_network(case, contestant.conv),
            train_images,
        )
        for contestant in contestants
    ]


def torch_network(case: Case, conv: str) -> dict[str, Any]:
    """What PyTorch's twin of the case's network is made with, as plain data."""
    names = (
        "blocks",
        "width",
        "stem",
        "block",
        "stem_width",
        "input_norm",
        "replaced",
        "dropout_rate",
    )
    config = network_config(case, conv)
    return {name: getattr(config, name) for name in names}


def make_schedule(settings: Settings) -> Schedule:
    """An epoch is a round of one step; other steps are repeated to fill a round."""
    if settings.what == "epoch":
        return Schedule(settings.epochs, runs=settings.runs, restarts=True, untimed=0)
    return Schedule(settings.rounds, round_seconds=settings.round_seconds)


def load_train_images(settings: Settings) -> TrainImages | None:
    """The training images of an epoch; None for everything else.

    Raises:
        DataError: if they cannot be loaded.
    """
    if settings.what != "epoch":
        return None
    images = settings.images
    folder = images.dataset == "folder"
    split = data.load(
        images.dataset,
        data_dir=images.data_dir,
        image_size=settings.image_size if folder else None,
        classes=images.classes,
        train_per_class=images.train_per_class,
    ).splits["train"]
    summary = split.summary
    return TrainImages(split.images, split.labels, summary.mean, summary.std)


def default_lowering(conv: str) -> str:
    """The lowering of a layer of that convolution that is given none."""
    kind = _kind(conv)
    return nnx.eval_shape(lambda: kind(1, 1, (1, 1), rngs=nnx.Rngs(0))).lowering


def _kind(conv: str) -> type[nnx.Module]:
    kind, _ = conv_and_width(conv)
    return CONVS[kind]


def model_shapes(case: Case) -> list[LayerShape]:
    """The different convolutions of the model that are an argument of it, in its own order."""
    config = network_config(case, "chansel")
    shapes = []
    for layer in config.layers():
        if unwrapped(layer.make) is config.conv:
            in_channels, out_channels, (kernel_size, _) = layer.make.args
            size, strides = -(-case.image_size // layer.reduction), layer.make.keywords["strides"]
            shapes.append(LayerShape(size, in_channels, out_channels, kernel_size, strides))
    return list(dict.fromkeys(shapes))


def _check_batch_size(batch_size: int, machine: Machine, train_images: TrainImages | None) -> None:
    if machine.platform == "cpu" and batch_size % machine.cpu_devices:
        raise PlanError(
            f"batch_size={batch_size} must be divisible by cpu_devices={machine.cpu_devices}"
        )
    if train_images is not None and batch_size > len(train_images.labels):
        raise PlanError(
            f"batch_size={batch_size} must be at most the {len(train_images.labels)} "
            "training images"
        )
