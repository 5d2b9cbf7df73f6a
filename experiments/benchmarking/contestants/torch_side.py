"""The contestants in PyTorch, tuned as PyTorch's own guide advises.

From https://docs.pytorch.org/tutorials/recipes/recipes/tuning_guide.html, where it applies:
gradients are set to None, convolutions before BatchNorm have no bias, nothing synchronises within a
step, cuDNN is autotuned, bfloat16 is autocast, the optimiser is fused, layouts are channels-last
and networks compiled in variants of their own, CUDA graphs among them. In an epoch, batches are
loaded by other processes, in pinned memory, and copied without waiting.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from experiments.benchmarking.cases import (
    Machine,
    Recipe,
    Task,
    TorchVariant,
    conv_and_width,
    image_batch,
    layer_batch,
)
from experiments.benchmarking.ceilings import Ceilings, Effort, best_rate
from experiments.benchmarking.contestants.runner import Runner, first_update, gradients
from experiments.pytorch.networks import TorchResNet, WeightedSumConv2d
from experiments.pytorch.pipeline import make_loader, normalise


@dataclasses.dataclass(frozen=True)
class Variant:
    """How a network is run.

    Attributes:
        memory_format: of images and kernels.
        compile_mode: of `torch.compile`; None runs eagerly.
        cuda_only: whether it is refused on CPUs.
    """

    memory_format: torch.memory_format = torch.contiguous_format
    compile_mode: str | None = None
    cuda_only: bool = False


VARIANTS: dict[TorchVariant, Variant] = {
    "eager": Variant(),
    "channels_last": Variant(torch.channels_last),
    "compiled": Variant(compile_mode="default"),
    "compiled_nhwc": Variant(torch.channels_last, "default"),
    "max_autotune": Variant(torch.channels_last, "max-autotune", cuda_only=True),
}


def make_runner(task: Task) -> Runner:
    """The contestant of `task`.

    Raises:
        RuntimeError: if it needs a GPU that PyTorch does not have.
    """
    cuda = task.machine.platform == "gpu"
    if cuda and not torch.cuda.is_available():
        raise RuntimeError("this PyTorch sees no GPU, and JAX is timed on one")
    if VARIANTS[task.contestant.variant].cuda_only and not cuda:
        raise RuntimeError("CUDA graphs exist on GPUs only")
    torch.manual_seed(task.case.seed)
    torch.set_num_threads(task.machine.threads)
    torch.backends.cudnn.benchmark = True
    set_tf32(task.case.dtype == "tf32")
    return RUNNERS[task.case.what](task)


def set_tf32(allowed: bool) -> None:
    """Lets the factors of float32 products be rounded on GPUs, or forbids it."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


def make_adamw(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Fused AdamW, without decay of biases and of BatchNorm."""
    undecayed = {
        parameter
        for module in network.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name == "bias" or isinstance(module, nn.BatchNorm2d)
    }
    decayed = [parameter for parameter in network.parameters() if parameter not in undecayed]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": list(undecayed), "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)


def make_module(task: Task) -> nn.Module:
    """The network, without dropout where outputs are compared, or the layer; weights follow."""
    case, arguments = task.case, dict(task.torch_network)
    conv, _ = conv_and_width(task.contestant.conv)
    if case.layer is None:
        if case.what != "epoch":
            arguments["dropout_rate"] = 0.0
        return TorchResNet(conv, num_classes=case.num_classes, **arguments)
    shape = case.layer
    return {"chansel": WeightedSumConv2d, "subkernel": nn.Conv2d}[conv](
        shape.in_channels,
        shape.out_channels,
        shape.kernel_size,
        stride=shape.stride,
        padding=shape.padding,
        bias=False,
    )


class _TorchRunner(Runner):
    """What all contestants in PyTorch share: layout, compilation, autocast, synchronisation."""

    def __init__(self, task: Task):
        self.task = task
        self.variant = VARIANTS[task.contestant.variant]
        self.device = torch.device("cuda" if task.machine.platform == "gpu" else "cpu")
        self.module = make_module(task)
        state = {name: torch.from_numpy(array.copy()) for name, array in task.weights.items()}
        # Of all that a module keeps, only `num_batches_tracked` may be missing: nothing uses it.
        missing, unexpected = self.module.load_state_dict(state, strict=False)
        if unexpected or any(not name.endswith("num_batches_tracked") for name in missing):
            raise ValueError(f"weights do not fit: {missing} missing, {unexpected} unexpected")
        self.module.to(self.device, memory_format=self.variant.memory_format)
        self.model = self.module
        if self.variant.compile_mode is not None:
            self.model = torch.compile(self.module, mode=self.variant.compile_mode)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Where products are taken in bfloat16, if that is the case's dtype."""
        if self.task.case.dtype != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def begin_step(self) -> None:
        """Lets CUDA graphs reuse the last step's memory."""
        if self.variant.cuda_only:
            torch.compiler.cudagraph_mark_step_begin()

    def synchronise(self) -> None:
        """Waits until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def first_call(self) -> float | None:
        """Seconds of the first step, in which a compiled network is compiled."""
        start = time.perf_counter()
        self.run(1)
        compiled = self.variant.compile_mode is not None
        return time.perf_counter() - start if compiled else None

    def eager_logits(self, images: torch.Tensor) -> np.ndarray:
        """Logits in evaluation; not compiled, since training compiles another function."""
        self.module.eval()
        with torch.inference_mode(), self.autocast():
            logits = self.module(images)
        self.module.train()
        return _to_numpy(logits)

    def parameters(self) -> dict[str, np.ndarray]:
        """The parameters by name."""
        return {name: _to_numpy(value) for name, value in self.module.named_parameters()}

    def gradients(self) -> dict[str, np.ndarray]:
        """Their gradients by name."""
        return {name: _to_numpy(value.grad) for name, value in self.module.named_parameters()}

    def put(self, array: np.ndarray) -> torch.Tensor:
        """Images `(N, H, W, C)` as PyTorch's `(N, C, H, W)` on the device, in the layout."""
        tensor = torch.from_numpy(array).permute(0, 3, 1, 2)
        return tensor.contiguous(memory_format=self.variant.memory_format).to(self.device)

    def reset_peak_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        super().reset_peak_memory()

    def peak_memory(self) -> int:
        cuda = self.device.type == "cuda"
        return torch.cuda.max_memory_allocated() if cuda else super().peak_memory()


class _Calls(_TorchRunner):
    """Calls that do not depend on each other: of a network in evaluation, or of one layer."""

    def __init__(self, task: Task):
        super().__init__(task)
        self.module.eval()
        case = task.case
        inputs = image_batch(case) if case.layer is None else layer_batch(case)
        self.x, *self.dy = (self.put(array) for array in inputs[: 1 + case.backward])
        if case.layer is not None and case.dtype == "bfloat16":
            self.x, *self.dy = (tensor.bfloat16() for tensor in (self.x, *self.dy))
        self.x.requires_grad_(case.backward)

    def warm_up(self):
        compile_seconds, case = self.first_call(), self.task.case
        outputs = {case.output: _channels_last(self.y)}
        if case.backward:
            outputs |= gradients({"the input": _channels_last(self.x.grad), **self.gradients()})
        return compile_seconds, outputs

    def run(self, steps):
        backward = self.task.case.backward
        with contextlib.nullcontext() if backward else torch.inference_mode():
            for _ in range(steps):
                if backward:
                    self.module.zero_grad(set_to_none=True)
                    self.x.grad = None
                self.begin_step()
                with self.autocast():
                    self.y = self.model(self.x)
                if backward:
                    self.y.backward(*self.dy)
        self.synchronise()


class _Training(_TorchRunner):
    """What a training step is, whichever batch it takes."""

    def __init__(self, task: Task):
        super().__init__(task)
        self.module.train()
        self.optimizer = make_adamw(self.module, task.recipe)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Updates the parameters; returns the loss and the logits, without waiting for them."""
        self.optimizer.zero_grad(set_to_none=True)
        self.begin_step()
        with self.autocast():
            logits = self.model(images)
        loss = functional.cross_entropy(logits.float(), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), logits.detach()


class _Step(_Training):
    """Training steps on one batch that lies on the device, one after the other."""

    def __init__(self, task: Task):
        super().__init__(task)
        images, labels = image_batch(task.case)
        self.images = self.put(images)
        self.labels = torch.from_numpy(labels).long().to(self.device)

    def warm_up(self):
        outputs = {"logits": self.eager_logits(self.images)}
        before = self.parameters()
        compile_seconds = self.first_call()
        outputs |= {"loss": _to_numpy(self.loss)} | gradients(self.gradients())
        return compile_seconds, outputs | first_update(before, self.parameters())

    def run(self, steps):
        for _ in range(steps):
            self.loss, _ = self.step(self.images, self.labels)
        self.synchronise()


class _Epoch(_Training):
    """Whole epochs with a loader in processes of its own."""

    warm_up_steps = 0

    def __init__(self, task: Task):
        super().__init__(task)
        self.initial = {name: value.clone() for name, value in self.module.state_dict().items()}
        data = task.train_images
        self.loader = make_loader(
            data.images,
            data.labels,
            task.case.batch_size,
            workers=task.machine.loader_workers,
            pin_memory=self.device.type == "cuda",
        )
        self.mean, self.std = (
            torch.from_numpy(each).to(self.device) for each in (data.mean, data.std)
        )

    def restart(self):
        self.module.load_state_dict(self.initial)
        self.optimizer = make_adamw(self.module, self.task.recipe)

    def warm_up(self):
        images, labels = image_batch(self.task.case)
        images, labels = self.put(images), torch.from_numpy(labels).long().to(self.device)
        logits = self.eager_logits(images)
        start = time.perf_counter()
        self.step(images, labels)
        self.synchronise()
        compile_seconds = time.perf_counter() - start
        self.restart()
        return compile_seconds if self.variant.compile_mode else None, {"logits": logits}

    def run(self, steps):
        for _ in range(steps):
            total = torch.zeros((), device=self.device)
            correct = torch.zeros((), dtype=torch.int64, device=self.device)
            for images, labels in self.loader:
                images = normalise(images.to(self.device, non_blocking=True), self.mean, self.std)
                images = images.contiguous(memory_format=self.variant.memory_format)
                labels = labels.to(self.device, non_blocking=True)
                loss, logits = self.step(images, labels)
                total += loss
                correct += (logits.argmax(1) == labels).sum()
            # What was learned is fetched, as at the end of an epoch of training.
            total.item(), correct.item()
        self.synchronise()


RUNNERS = {"step": _Step, "forward": _Calls, "layer": _Calls, "epoch": _Epoch}


def describe() -> dict[str, str]:
    """The device and what drives it."""
    if not torch.cuda.is_available():
        capability = torch.backends.cpu.get_cpu_capability()
        return {"platform": "cpu", "device": "cpu", "runtime": capability}
    runtime = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return {"platform": "gpu", "device": torch.cuda.get_device_name(), "runtime": runtime}


def measure(machine: Machine, effort: Effort, dtypes: Sequence[str]) -> Ceilings:
    """The ceilings that PyTorch reaches."""
    torch.set_num_threads(machine.threads)
    device = torch.device("cuda" if machine.platform == "gpu" else "cpu")
    source = torch.ones(effort.copy_bytes // 4, device=device)
    copy = _synchronised(functools.partial(torch.empty_like(source).copy_, source), device)
    return Ceilings(
        best_rate(2 * source.nbytes, copy, effort.seconds),
        {dtype: _product_rate(effort, dtype, device) for dtype in dtypes},
    )


def _product_rate(effort: Effort, dtype: str, device: torch.device) -> float:
    set_tf32(dtype == "tf32")
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    factor = torch.randn((effort.product_size,) * 2, dtype=kind, device=device)
    product = _synchronised(functools.partial(torch.mm, factor, factor), device)
    return best_rate(effort.product_size**3, product, effort.seconds)


def _synchronised(function: Callable[[], object], device: torch.device) -> Callable[[], None]:
    def call() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    # A copy: the next step may overwrite the memory.
    return tensor.detach().float().cpu().numpy().copy()


def _channels_last(tensor: torch.Tensor) -> np.ndarray:
    return _to_numpy(tensor.movedim(1, -1))
