"""The weights that all contestants of a case share, in PyTorch's names and layouts."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from chansel_jax.networks.resnet import ResNet, ResNetConfig
from chansel_jax.torch_weights import to_numpy
from experiments.benchmarking.cases import Case
from experiments.benchmarking.work import network_config


def make_weights(case: Case, conv: str) -> dict[str, np.ndarray]:
    """What `case` initialises a contestant of `conv` with."""
    return network_weights(case, conv) if case.layer is None else layer_weights(case, conv)


def network_weights(case: Case, conv: str) -> dict[str, np.ndarray]:
    """A network's, with the variances the library initialises with.

    But biases, scales and running statistics differ from each other and from 0 and 1, or a mistake
    in carrying them across would not show in the outputs.
    """
    network = uninitialised(network_config(case, conv))
    rng = np.random.default_rng(case.seed)
    return {name: _drawn(name, array.shape, rng) for name, array in to_numpy(network).items()}


def _drawn(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if len(shape) > 1:
        # He's variance for kernels, LeCun's for products over channels.
        variance = (2 if len(shape) == 4 else 1) / np.prod(shape[1:])
        return rng.standard_normal(shape, np.float32) * np.float32(variance**0.5)
    if name.endswith(("bias", "running_mean")):
        return 0.1 * rng.standard_normal(shape, np.float32)
    return rng.uniform(0.8, 1.2, shape).astype(np.float32)


def uninitialised(config: ResNetConfig) -> ResNet:
    """The network of `config`, filled with zeros: to draw numbers in JAX takes seconds."""
    graph, state = nnx.split(nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, jax.tree.map(_zeros, state))


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    return jax.device_put(np.zeros(leaf.shape, leaf.dtype))


def layer_weights(case: Case, conv: str) -> dict[str, np.ndarray]:
    """A single layer's, normal, each kernel scaled by its inputs."""
    layer, rng = case.layer, np.random.default_rng(case.seed)
    window = (layer.kernel_size, layer.kernel_size)
    shapes = {
        "chansel": {
            "fc.weight": (layer.out_channels, layer.in_channels),
            "conv2d.weight": (layer.out_channels, 1, *window),
        },
        "subkernel": {"weight": (layer.out_channels, layer.in_channels, *window)},
    }
    return {
        name: rng.standard_normal(shape, np.float32) / np.float32(np.prod(shape[1:]) ** 0.5)
        for name, shape in shapes[conv].items()
    }
