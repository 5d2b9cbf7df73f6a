"""The contestants in JAX: the library's own networks and optimiser; in an epoch its training step.

`--what=step` takes one fixed batch, which PyTorch's steps do too, so it leaves out augmentation.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from chansel_jax import functional
from chansel_jax.conv import lowerings_taken
from chansel_jax.memory import hand_back_memory
from chansel_jax.networks.resnet import CONVS, ResNet
from chansel_jax.torch_weights import from_torch, to_numpy
from chansel_jax.training import devices
from chansel_jax.training.augmentation import Augmentation
from chansel_jax.training.batches import Batch, TrainingOrder, take
from chansel_jax.training.optimizer import OptimizerSettings, make_optimizer, make_schedule
from chansel_jax.training.step import TrainState, init_state, init_totals, make_train_step
from experiments.benchmarking.cases import (
    Case,
    Contestant,
    Machine,
    Recipe,
    Task,
    conv_and_width,
    image_batch,
    layer_batch,
)
from experiments.benchmarking.ceilings import Ceilings, Effort, best_rate, numpy_copy_rate
from experiments.benchmarking.contestants.runner import Runner, first_update, gradients
from experiments.benchmarking.contestants.weights import uninitialised
from experiments.benchmarking.work import network_config

# The factors of float32 products are rounded on GPUs unless forbidden.
PRECISIONS = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": "default"}

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
    kind, _ = conv_and_width(contestant.conv)
    return functools.partial(CONVS[kind], lowering=contestant.variant)


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


def make_layer(task: Task) -> nnx.Module:
    """The layer with the weights of `task`."""
    shape = task.case.layer
    layer = conv_of(task.contestant)(
        shape.in_channels,
        shape.out_channels,
        (shape.kernel_size, shape.kernel_size),
        strides=shape.stride,
        padding=shape.padding,
        use_bias=False,
        dtype=_dtype(task.case),
        rngs=nnx.Rngs(0),
    )
    from_torch(layer, task.weights)
    return layer


def took(task: Task, module: nnx.Module) -> str | None:
    """What `"auto"` took for the convolutions of `module`; None if it was not asked for."""
    if task.contestant.variant != "auto":
        return None
    taken = lowerings_taken(module, _dtype(task.case)).values()
    return ", ".join(dict.fromkeys(itertools.chain(*taken)))


def by_torch_name(module: nnx.Module, params: Any) -> dict[str, np.ndarray]:
    """A tree of the shape of the parameters of `module`, in PyTorch's names and layouts."""
    holder = nnx.clone(module)
    nnx.update(holder, params)
    running = ("running_mean", "running_var")
    return {name: array for name, array in to_numpy(holder).items() if not name.endswith(running)}


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

    def peak_memory(self) -> int:
        statistics = self.mesh.devices.flat[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else super().peak_memory()


class _Calls(_JaxRunner):
    """Calls that do not depend on each other: of a network in evaluation, or of one layer."""

    def __init__(self, task: Task):
        super().__init__(task)
        case = task.case
        self.module = make_network(task) if case.layer is None else make_layer(task)
        self.module.eval()
        self.took = took(task, self.module)
        self.graph, state = nnx.split(self.module)
        inputs = image_batch(case) if case.layer is None else layer_batch(case)
        inputs = jax.device_put(inputs[: 1 + case.backward], self.sharded)
        if case.layer is not None:
            inputs = [array.astype(_dtype(case)) for array in inputs]
        state = jax.device_put(nnx.to_pure_dict(state), self.replicated)
        self.arguments = (state, *inputs)

    def warm_up(self):
        def forward(state, x):
            return nnx.merge(self.graph, state)(x)

        def forward_backward(state, x, dy):
            y, pull = jax.vjp(forward, state, x)
            return y, pull(dy)

        case = self.task.case
        function = jax.jit(forward_backward if case.backward else forward)
        self.function = self.compiled(function, *self.arguments)
        result = self.function(*self.arguments)
        if not case.backward:
            return self.compile_seconds, {case.output: np.asarray(result, np.float32)}
        y, (dstate, dx) = result
        found = {"the input": np.asarray(dx, np.float32), **by_torch_name(self.module, dstate)}
        return self.compile_seconds, {case.output: np.asarray(y, np.float32)} | gradients(found)

    def run(self, steps):
        result = None
        for _ in range(steps):
            result = self.function(*self.arguments)
            # PyTorch computes in the caller's thread on CPUs, and one call after the other on GPUs;
            # JAX would compute several at once on CPUs.
            if self.task.machine.platform == "cpu":
                jax.block_until_ready(result)
        jax.block_until_ready(result)


class _Step(_JaxRunner):
    """Training steps on one batch that lies on the device, one after the other."""

    def __init__(self, task: Task):
        super().__init__(task)
        self.network, self.optimizer = make_network(task), make_adamw(task.recipe)
        self.took = took(task, self.network)
        self.state = init_state(self.network, self.optimizer, task.case.seed, self.mesh)
        self.batch = jax.device_put(image_batch(task.case), self.sharded)

    def warm_up(self):
        outputs = {"logits": eval_logits(self.network, self.state, self.batch[0])}
        step = jax.jit(
            make_step(self.network, self.optimizer),
            donate_argnums=0,
            out_shardings=self.replicated,
        )
        self.step = self.compiled(step, self.state, *self.batch)
        before = by_torch_name(self.network, self.state.params)
        self.run(1)
        outputs["loss"] = np.asarray(self.loss)
        # The step does not return its gradients; the optimiser's first moment holds them.
        moments = by_torch_name(self.network, optax.tree.get(self.state.opt_state, "mu"))
        outputs |= gradients({name: moment / (1 - ADAM_B1) for name, moment in moments.items()})
        after = by_torch_name(self.network, self.state.params)
        return self.compile_seconds, outputs | first_update(before, after)

    def run(self, steps):
        for _ in range(steps):
            self.state, self.loss = self.step(self.state, *self.batch)
        jax.block_until_ready(self.state)


class _Epoch(_JaxRunner):
    """Whole epochs as `experiments.train` runs them: data on the device, augmented in the step."""

    warm_up_steps = 0

    def __init__(self, task: Task):
        super().__init__(task)
        data = task.train_images
        self.network, self.optimizer = make_network(task), make_adamw(task.recipe)
        self.took = took(task, self.network)
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
        logits = eval_logits(self.network, self.state, images)
        step = make_train_step(
            self.network, self.optimizer, mesh=self.mesh, augmentation=Augmentation()
        )
        totals, batch = init_totals(self.mesh), self._batch(0)
        self.step = self.compiled(step, self.state, totals, batch, *self.statistics)
        return self.compile_seconds, {"logits": logits}

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


RUNNERS = {"step": _Step, "forward": _Calls, "layer": _Calls, "epoch": _Epoch}


def eval_logits(network: nnx.Module, state: TrainState, images: jax.Array) -> np.ndarray:
    """Logits in evaluation."""
    apply = jax.jit(functional.apply_function(network, train=False))
    return np.asarray(apply(state.params, state.batch_stats, images, None)[0])


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
        with jax.numpy_dtype_promotion("standard"):  # which Optax asks for
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
    rate = copy_rate(effort)
    if machine.platform == "cpu":
        rate = max(rate, numpy_copy_rate(effort, machine.threads))
    return Ceilings(rate, {dtype: _product_rate(effort, dtype) for dtype in dtypes})


def copy_rate(effort: Effort) -> float:
    """Bytes read and written a second by XLA."""
    source = jnp.ones(effort.copy_bytes // 4)
    copy = jax.jit(lambda x: x + 1)
    return best_rate(2 * source.nbytes, lambda: copy(source).block_until_ready(), effort.seconds)


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
