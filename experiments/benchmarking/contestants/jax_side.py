"""The contestants in JAX: the library's own networks and optimiser; in an epoch its training step.

`--what=step` takes one fixed batch, which PyTorch's steps do too, so it leaves out augmentation.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from chansel_jax import functional
from chansel_jax.networks.resnet import CONVS, ResNet
from chansel_jax.torch_weights import from_torch, to_torch
from chansel_jax.training import devices
from chansel_jax.training.augmentation import Augmentation
from chansel_jax.training.batches import Batch, TrainingOrder, take
from chansel_jax.training.optimizer import OptimizerSettings, make_optimizer, make_schedule
from chansel_jax.training.step import init_state, init_totals, make_train_step
from experiments.benchmarking.cases import (
    Case,
    Contestant,
    Machine,
    Recipe,
    Task,
    image_batch,
    layer_batch,
)
from experiments.benchmarking.ceilings import Ceilings, Effort, best_rate, numpy_copy_rate
from experiments.benchmarking.contestants.runner import FIRST_UPDATE, Runner, first_update
from experiments.benchmarking.contestants.weights import uninitialised
from experiments.benchmarking.work import network_config
from experiments.cli.memory import hand_back_memory

# The factors of float32 products are rounded on GPUs unless forbidden.
PRECISIONS = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default"}

# A layer's parameters by their names in PyTorch, with the axes that `chansel_jax.torch_weights`
# permutes for a whole network.
LAYER_WEIGHTS = {
    "chansel": {"fc.weight": ("pointwise", (1, 0)), "conv2d.weight": ("depthwise", (2, 3, 1, 0))},
    "subkernel": {"weight": ("kernel", (2, 3, 1, 0))},
}

ADAM_B1 = 0.9


def make_runner(task: Task) -> Runner:
    """The contestant of `task`."""
    jax.config.update("jax_default_matmul_precision", PRECISIONS[task.case.dtype])
    # A compilation that was cached by an earlier benchmark would be reported as fast.
    jax.config.update("jax_enable_compilation_cache", False)
    if task.machine.platform == "cpu":
        jax.config.update("jax_num_cpu_devices", task.machine.cpu_devices)
    return RUNNERS[task.case.what](task)


def conv_of(contestant: Contestant) -> Callable[..., nnx.Module]:
    """The convolution, called as `nnx.Conv` is."""
    return functools.partial(CONVS[contestant.conv], lowering=contestant.variant)


def make_network(task: Task) -> ResNet:
    """The network with the weights of `task`; without dropout where outputs are compared."""
    case = task.case
    config = dataclasses.replace(
        network_config(case, task.contestant.conv),
        conv=conv_of(task.contestant),
        dtype=_dtype(case),
        **({} if case.what == "epoch" else {"dropout_rate": 0.0}),
    )
    network = uninitialised(config)
    from_torch(network, task.weights)
    return network


def make_adamw(recipe: Recipe) -> optax.GradientTransformation:
    """The optimiser of `experiments.train` at a constant learning rate."""
    settings = OptimizerSettings(
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        schedule="constant",
        warmup_fraction=0.0,
    )
    return make_optimizer(settings, make_schedule(settings, epochs=1, steps_per_epoch=1))


class _JaxRunner(Runner):
    """What all contestants in JAX share: the mesh, compilation ahead of time, device memory."""

    def __init__(self, task: Task):
        self.task = task
        self.mesh = devices.data_mesh()
        self.replicated = NamedSharding(self.mesh, PartitionSpec())
        self.sharded = NamedSharding(self.mesh, PartitionSpec("data"))
        self.compile_seconds = 0.0

    def compiled(self, function: Callable, *arguments: Any) -> Callable:
        """The jitted `function`, compiled for `arguments`; the seconds are noted."""
        start = time.perf_counter()
        compiled = function.lower(*arguments).compile()
        self.compile_seconds = time.perf_counter() - start
        return compiled

    def wait(self, arrays: Any) -> None:
        """Waits for one of many calls that do not depend on each other.

        PyTorch computes in the caller's thread on CPUs, and one call after the other on GPUs; JAX
        would compute several at once on CPUs.
        """
        if self.task.machine.platform == "cpu":
            jax.block_until_ready(arrays)

    def peak_memory(self) -> int:
        statistics = self.mesh.devices.flat[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else super().peak_memory()


class _Forward(_JaxRunner):
    """The logits of a batch in evaluation."""

    def __init__(self, task: Task):
        super().__init__(task)
        self.network = make_network(task)
        self.state = jax.device_put(_network_state(self.network), self.replicated)
        self.images = jax.device_put(image_batch(task.case)[0], self.sharded)

    def warm_up(self):
        forward = jax.jit(_forward(self.network))
        self.forward = self.compiled(forward, *self.state, self.images)
        return self.compile_seconds, {"logits": np.asarray(self.forward(*self.state, self.images))}

    def run(self, steps):
        logits = None
        for _ in range(steps):
            logits = self.forward(*self.state, self.images)
            self.wait(logits)
        jax.block_until_ready(logits)


class _Step(_JaxRunner):
    """Training steps on one batch that lies on the device, one after the other."""

    def __init__(self, task: Task):
        super().__init__(task)
        self.network, self.optimizer = make_network(task), make_adamw(task.recipe)
        self.state = init_state(self.network, self.optimizer, task.case.seed, self.mesh)
        self.batch = jax.device_put(image_batch(task.case), self.sharded)

    def warm_up(self):
        forward = jax.jit(_forward(self.network))
        logits = forward(self.state.params, self.state.batch_stats, self.batch[0])
        outputs = {"logits": np.asarray(logits)}
        step = jax.jit(
            make_step(self.network, self.optimizer),
            donate_argnums=0,
            out_shardings=self.replicated,
        )
        self.step = self.compiled(step, self.state, *self.batch)
        before = self._by_torch_name(self.state.params)
        self.run(1)
        outputs["loss"] = np.asarray(self.loss)
        # The step does not return its gradients; the optimiser's first moment holds them.
        moments = self._by_torch_name(optax.tree.get(self.state.opt_state, "mu"))
        for name, moment in moments.items():
            outputs[f"gradient of {name}"] = moment / (1 - ADAM_B1)
        outputs[FIRST_UPDATE] = first_update(before, self._by_torch_name(self.state.params))
        return self.compile_seconds, outputs

    def run(self, steps):
        for _ in range(steps):
            self.state, self.loss = self.step(self.state, *self.batch)
        jax.block_until_ready(self.state)

    def _by_torch_name(self, params: Any) -> dict[str, np.ndarray]:
        """A tree of the parameters' shape, in PyTorch's names and layouts."""
        holder = nnx.clone(self.network)
        nnx.update(holder, params)
        running = ("running_mean", "running_var")
        arrays = to_torch(holder)
        return {name: array for name, array in arrays.items() if not name.endswith(running)}


class _Layer(_JaxRunner):
    """One layer, forward or with the gradients of input and weights."""

    def __init__(self, task: Task):
        super().__init__(task)
        shape, dtype = task.case.layer, _dtype(task.case)
        layer = conv_of(task.contestant)(
            shape.in_channels,
            shape.out_channels,
            shape.kernel_size,
            strides=shape.stride,
            padding=shape.padding,
            use_bias=False,
            dtype=dtype,
            rngs=nnx.Rngs(0),
        )
        self.names = LAYER_WEIGHTS[task.contestant.conv]
        self.graph, state = nnx.split(layer)
        params = {
            name: jnp.asarray(task.weights[torch_name].transpose(axes))
            for torch_name, (name, axes) in self.names.items()
        }
        self.params = jax.device_put(nnx.to_pure_dict(state) | params, self.replicated)
        x, dy = (jnp.asarray(array, dtype) for array in layer_batch(task.case))
        self.x, self.dy = jax.device_put((x, dy), self.sharded)

    def warm_up(self):
        def forward(params, x):
            return nnx.merge(self.graph, params)(x)

        def forward_backward(params, x, dy):
            y, pull = jax.vjp(forward, params, x)
            return y, pull(dy)

        backward = self.task.case.backward
        self.arguments = (self.params, self.x, self.dy) if backward else (self.params, self.x)
        function = jax.jit(forward_backward if backward else forward)
        self.function = self.compiled(function, *self.arguments)
        return self.compile_seconds, self._outputs(self.function(*self.arguments))

    def run(self, steps):
        result = None
        for _ in range(steps):
            result = self.function(*self.arguments)
            self.wait(result)
        jax.block_until_ready(result)

    def _outputs(self, result: Any) -> Mapping[str, np.ndarray]:
        if not self.task.case.backward:
            return {"output": np.asarray(result, np.float32)}
        y, (dparams, dx) = result
        outputs = {"output": y, "gradient of the input": dx}
        for torch_name, (name, axes) in self.names.items():
            outputs[f"gradient of {torch_name}"] = dparams[name].transpose(np.argsort(axes))
        return {name: np.asarray(array, np.float32) for name, array in outputs.items()}


class _Epoch(_JaxRunner):
    """Whole epochs as `experiments.train` runs them: data on the device, augmented in the step."""

    warm_up_steps = 0

    def __init__(self, task: Task):
        super().__init__(task)
        data = task.train_images
        self.network, self.optimizer = make_network(task), make_adamw(task.recipe)
        self.steps = len(data.labels) // task.case.batch_size
        self.split = devices.replicate(Batch(data.images, data.labels), self.mesh)
        self.statistics = devices.replicate((data.mean, data.std), self.mesh)
        self.restart()

    def restart(self):
        case = self.task.case
        self.state = init_state(self.network, self.optimizer, case.seed, self.mesh)
        count, key = len(self.split.labels), np.asarray(self.state.key)
        self.order = TrainingOrder(key, count, case.batch_size, self.steps)

    def warm_up(self):
        images = jax.device_put(image_batch(self.task.case)[0], self.sharded)
        forward = jax.jit(_forward(self.network))
        logits = forward(self.state.params, self.state.batch_stats, images)
        step = make_train_step(
            self.network, self.optimizer, mesh=self.mesh, augmentation=Augmentation()
        )
        totals, batch = init_totals(self.mesh), self._batch(0)
        self.step = self.compiled(step, self.state, totals, batch, *self.statistics)
        return self.compile_seconds, {"logits": np.asarray(logits)}

    def run(self, steps):
        for _ in range(steps):
            first, totals = int(self.state.step), init_totals(self.mesh)
            for number in range(first, first + self.steps):
                batch = self._batch(number)
                self.state, totals = self.step(self.state, totals, batch, *self.statistics)
            # What was learned is fetched, as at the end of an epoch of training.
            jax.device_get(totals)
            hand_back_memory()
        jax.block_until_ready(self.state)

    def _batch(self, step: int) -> Batch:
        return take(self.split, self.order(step), self.mesh)


RUNNERS = {"step": _Step, "forward": _Forward, "layer": _Layer, "epoch": _Epoch}


def make_step(network: nnx.Module, optimizer: optax.GradientTransformation) -> Callable:
    """The step `(state, images, labels) -> (state, loss)` of training on normalised images."""
    apply = functional.apply_function(network, train=True)

    def step(state, images, labels):
        def loss_function(params):
            logits, batch_stats = apply(params, state.batch_stats, images, None)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return jnp.mean(losses), batch_stats

        (loss, batch_stats), gradients = jax.value_and_grad(loss_function, has_aux=True)(
            state.params
        )
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        state = dataclasses.replace(
            state,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
            step=state.step + 1,
        )
        return state, loss

    return step


def describe() -> dict[str, str]:
    """The device and what drives it."""
    device = jax.local_devices()[0]
    return {
        "platform": "gpu" if device.platform in ("gpu", "cuda", "rocm") else device.platform,
        "device": device.device_kind,
        "runtime": device.client.platform_version,
    }


def measure(machine: Machine, effort: Effort, dtypes: Sequence[str]) -> Ceilings:
    """The ceilings that JAX, or on CPUs NumPy, reaches."""
    source = jnp.ones(effort.copy_bytes // 4)
    copy = jax.jit(lambda x: x + 1)
    copied = 2 * source.nbytes
    rate = best_rate(copied, lambda: copy(source).block_until_ready(), effort.seconds)
    if machine.platform == "cpu":
        rate = max(rate, numpy_copy_rate(effort, machine.threads))
    return Ceilings(rate, {dtype: _product_rate(effort, dtype) for dtype in dtypes})


def _product_rate(effort: Effort, dtype: str) -> float:
    kind = jnp.bfloat16 if dtype == "bfloat16" else jnp.float32
    factor = jax.random.normal(jax.random.key(0), (effort.product_size,) * 2, kind)
    product = jax.jit(functools.partial(jnp.dot, precision=PRECISIONS[dtype]))
    return best_rate(
        effort.product_size**3,
        lambda: product(factor, factor).block_until_ready(),
        effort.seconds,
    )


def _dtype(case: Case) -> Any:
    return jnp.bfloat16 if case.dtype == "bfloat16" else jnp.float32


def _network_state(network: nnx.Module) -> tuple[Any, Any]:
    _, params, batch_stats, _ = nnx.split(network, nnx.Param, nnx.BatchStat, ...)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)


def _forward(network: nnx.Module) -> Callable:
    """`(params, batch_stats, images) -> logits` in evaluation."""
    apply = functional.apply_function(network, train=False)
    return lambda params, batch_stats, images: apply(params, batch_stats, images, None)[0]
