"""The weights that all contestants of a case share, in PyTorch's names and layouts."""

import numpy as np
from flax import nnx

from chansel_jax.resnet import CONVS, PRESETS
from chansel_jax.torch_weights import to_torch
from experiments.benchmarking.cases import Case, Conv


def make_weights(case: Case, conv: Conv) -> dict[str, np.ndarray]:
    """What `case` initialises a contestant of `conv` with."""
    return network_weights(case, conv) if case.layer is None else layer_weights(case, conv)


def network_weights(case: Case, conv: Conv) -> dict[str, np.ndarray]:
    """A network's, initialised as the library does.

    But biases, scales and running statistics differ from each other and from 0 and 1, or a mistake
    in carrying them across would not show in the outputs.
    """
    network = PRESETS[case.model](CONVS[conv], case.num_classes, rngs=nnx.Rngs(case.seed))
    rng = np.random.default_rng(case.seed)
    weights = to_torch(network)
    for name, array in weights.items():
        if array.ndim == 1:
            array *= rng.uniform(0.8, 1.2, array.shape).astype(array.dtype)
            if not name.endswith("running_var"):
                array += 0.1 * rng.standard_normal(array.shape, array.dtype)
    return weights


def layer_weights(case: Case, conv: Conv) -> dict[str, np.ndarray]:
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
