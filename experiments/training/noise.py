"""Training steps on random images, for what measures them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from chansel_jax.networks.resnet import ResNet, ResNetConfig
from chansel_jax.training import devices
from chansel_jax.training.augmentation import Augmentation
from chansel_jax.training.batches import Batch
from chansel_jax.training.optimizer import OptimizerSettings, make_optimizer, make_schedule
from chansel_jax.training.step import TrainState, init_state, init_totals, make_train_step


def training_on_noise(
    config: ResNetConfig, images: int, mesh: Mesh
) -> tuple[Callable[[], TrainState], str]:
    """A function that takes a step on a batch of noise, and the compiled step as XLA's text."""
    network = ResNet(config, rngs=nnx.Rngs(0))
    defaults = OptimizerSettings()
    optimizer = make_optimizer(defaults, make_schedule(defaults, epochs=1, steps_per_epoch=1000))
    state = init_state(network, optimizer, 0, mesh)
    totals = init_totals(mesh)
    batch = _noise(images, config.image_size, config.num_classes, mesh)
    mean_std = devices.replicate((np.full(3, 128, np.float32), np.full(3, 64, np.float32)), mesh)
    step = make_train_step(network, optimizer, mesh=mesh, augmentation=Augmentation())
    compiled = step.lower(state, totals, batch, *mean_std).compile()

    def take_step():
        nonlocal state, totals
        state, totals = compiled(state, totals, batch, *mean_std)
        return state

    return take_step, compiled.as_text()


def layer_on_noise(
    layer: nnx.Module, images: tuple[int, ...], mesh: Mesh
) -> tuple[Callable[[], Any], str]:
    """The same for forward and backward pass of one layer on noise of the shape `images`."""
    graph, state = nnx.split(layer)

    def passes(state, x, dy):
        y, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x), state, x)
        return y, pull(dy)

    def normal(shape):
        noise = np.random.default_rng(0).standard_normal(shape)
        return jax.device_put(noise.astype(layer.dtype), devices.batch_sharding(mesh))

    output = jax.eval_shape(layer, jax.ShapeDtypeStruct(images, layer.dtype))
    arguments = (devices.replicate(state, mesh), normal(images), normal(output.shape))
    compiled = jax.jit(passes).lower(*arguments).compile()
    return lambda: compiled(*arguments), compiled.as_text()


def _noise(count: int, size: int, classes: int, mesh: Mesh) -> Batch:
    sharding = devices.batch_sharding(mesh)

    def put(shape, below, dtype):
        def part(index):
            part_shape = [len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True)]
            return np.random.default_rng(0).integers(below, size=part_shape, dtype=dtype)

        return jax.make_array_from_callback(shape, sharding, part)

    images = put((count, size, size, 3), 256, np.uint8)
    return Batch(images, put((count,), classes, np.int32))
