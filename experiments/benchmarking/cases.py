"""What is timed: plain data, understood by the parent and by the workers of both frameworks.

Neither JAX nor PyTorch is imported here: a worker holds one framework alone, so that its peak
memory is that framework's.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

What = Literal["step", "forward", "layer", "epoch"]
Dtype = Literal["float32", "tf32", "bfloat16"]
Framework = Literal["JAX", "PyTorch"]
Conv = Literal["chansel", "subkernel"]
NETWORK_FORMAT = "CONV or CONV-wWIDTH, where CONV is chansel or subkernel"
TorchVariant = Literal["eager", "channels_last", "compiled", "compiled_nhwc", "max_autotune"]


def conv_and_width(network: str) -> tuple[Conv, int | None]:
    """Of a network's name, as `chansel-w32`; the width is None where it is the model's own.

    Raises:
        ValueError: if it is none.
    """
    match = re.fullmatch(r"(chansel|subkernel)(?:-w([1-9]\d{0,5}))?", network)
    if match is None:
        raise ValueError(f"convs={network} must be {NETWORK_FORMAT}")
    conv, width = match.groups()
    return conv, width and int(width)


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One convolution: square images, a square kernel, padding that keeps the size at stride 1."""

    size: int
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int

    @property
    def padding(self) -> int:
        """Pixels added on each side."""
        return self.kernel_size // 2

    @property
    def output_size(self) -> int:
        """Pixels of the output each way."""
        return (self.size + 2 * self.padding - self.kernel_size) // self.stride + 1

    def __str__(self) -> str:
        stride = f"/{self.stride}" if self.stride > 1 else ""
        window = f"{self.kernel_size}×{self.kernel_size}{stride}"
        return f"{self.size}² {self.in_channels}→{self.out_channels} {window}"


@dataclasses.dataclass(frozen=True)
class Case:
    """What all contestants that are compared with each other have in common.

    Attributes:
        what: a training step, a forward pass in evaluation, one layer, or an epoch.
        model: the network, a name in `chansel_jax.networks.resnet.PRESETS`.
        batch_size: images a step.
        image_size: pixels of an image each way.
        num_classes: logits of the network.
        dtype: of the computation. `"float32"` is that exactly; `"tf32"` rounds the factors of
            products on GPUs; `"bfloat16"` has float32 parameters, and is PyTorch's autocast.
        seed: decides weights, batches and the order of contestants.
        layer: the layer, for `what="layer"`.
        backward: for `what="layer"`, whether both gradients are computed as well.
    """

    what: What
    model: str
    batch_size: int
    image_size: int
    num_classes: int
    dtype: Dtype
    seed: int = 0
    layer: LayerShape | None = None
    backward: bool = False

    @property
    def title(self) -> str:
        """What tells this case from the others of a benchmark."""
        if self.layer is None:
            return self.dtype
        return f"{self.layer}, {'forward + backward' if self.backward else 'forward'}, {self.dtype}"

    @property
    def output(self) -> str:
        """What the result of a forward pass is called."""
        return "logits" if self.layer is None else "output"


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to compute a case.

    Attributes:
        framework: JAX or PyTorch.
        conv: the convolution, of a network of another width with that: `conv_and_width`.
        variant: in JAX a lowering, in PyTorch one of `TorchVariant`.
    """

    framework: Framework
    conv: str
    variant: str

    @property
    def name(self) -> str:
        """As in `"JAX chansel grouped"`."""
        return f"{self.framework} {self.conv} {self.variant}"


@dataclasses.dataclass(frozen=True)
class TrainImages:
    """The training images of an epoch: `(N, H, W, C)` uint8, `(N,)` int32, `(C,)` float32 twice."""

    images: np.ndarray
    labels: np.ndarray
    mean: np.ndarray
    std: np.ndarray


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the contestants run on.

    Attributes:
        platform: `"cpu"` or `"gpu"`.
        threads: of a CPU, as many as cores this process may use.
        cpu_devices: virtual CPU devices that JAX shards the batch over.
        loader_workers: processes that load PyTorch's batches in an epoch.
    """

    platform: Literal["cpu", "gpu"]
    threads: int
    cpu_devices: int = 1
    loader_workers: int = 1


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW's settings, at a constant learning rate; biases and norms are not decayed."""

    learning_rate: float
    weight_decay: float


@dataclasses.dataclass(frozen=True)
class Task:
    """All that a worker needs to run one contestant.

    Attributes:
        case: what is timed.
        contestant: how it is computed.
        machine: what it runs on.
        recipe: how parameters are updated.
        weights: in PyTorch's names and layouts, for both frameworks.
        torch_network: what PyTorch's network is made with, but its kind and classes.
        train_images: for an epoch.
    """

    case: Case
    contestant: Contestant
    machine: Machine
    recipe: Recipe
    weights: Mapping[str, np.ndarray]
    torch_network: Mapping[str, Any]
    train_images: TrainImages | None = None


def image_batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The fixed batch: normalised images `(N, H, W, 3)` float32 and labels `(N,)` int32."""
    rng = np.random.default_rng(case.seed)
    shape = (case.batch_size, case.image_size, case.image_size, 3)
    images = rng.standard_normal(shape, np.float32)
    return images, rng.integers(case.num_classes, size=case.batch_size, dtype=np.int32)


def layer_batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """A layer's input `(N, H, W, C_in)` and the gradient of its output, both float32."""
    rng, layer = np.random.default_rng(case.seed), case.layer
    x = rng.standard_normal((case.batch_size, layer.size, layer.size, layer.in_channels))
    size = layer.output_size
    dy = rng.standard_normal((case.batch_size, size, size, layer.out_channels))
    return x.astype(np.float32), dy.astype(np.float32)
