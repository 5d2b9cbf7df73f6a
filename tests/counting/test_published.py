"""Parameters and FLOPs that the authors of BSConv have published for their networks.

They count, besides multiply-adds, two operations for each element that BatchNorm takes, and one for
each that ReLU gives, the last pooling takes, or a bias is added to. The figures are of the README
of their repository zeiss-microscopy/BSConv, for CIFAR-100 and in millions.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from chansel_jax import (
    ChannelSelectionConv,
    ResNet,
    SubKernelConv,
    SubspaceChannelSelectionConv,
    cifar_resnet,
    wide_resnet,
)
from chansel_jax.counting import count
from chansel_jax.norm import BatchNorm

CONVS = {
    "": SubKernelConv,
    "bsconvu": ChannelSelectionConv,
    "bsconvs_p1d4": functools.partial(SubspaceChannelSelectionConv, norm=True),
}
PUBLISHED = {
    "resnet20": {"": (0.28, 41.42), "bsconvu": (0.05, 7.86), "bsconvs_p1d4": (0.03, 5.66)},
    "wrn16_1": {"": (0.18, 27.07), "bsconvu": (0.03, 5.57), "bsconvs_p1d4": (0.02, 4.02)},
    "wrn16_10": {"": (17.17, 2415.77), "bsconvu": (2.24, 386.36), "bsconvs_p1d4": (1.29, 204.60)},
}
CONFIGS = {
    "resnet20": cifar_resnet(20),
    "wrn16_1": wide_resnet(16, 1),
    "wrn16_10": wide_resnet(16, 10),
}
CASES = [(name, variant) for name, variants in PUBLISHED.items() for variant in variants]


def elementwise(network, images):
    """What the authors count of BatchNorm, ReLU, the last pooling and biases, for one image."""
    total = 0

    def counted(function, cost):
        def call(*arguments, **options):
            nonlocal total
            output = function(*arguments, **options)
            total += cost(*arguments, output, **options)
            return output

        return call

    with pytest.MonkeyPatch.context() as patch:
        norm = counted(BatchNorm.__call__, lambda layer, x, y, **_: 2 * x.size)
        patch.setattr(BatchNorm, "__call__", norm)
        patch.setattr(nnx, "relu", counted(nnx.relu, lambda x, y: y.size))
        linear = counted(nnx.Linear.__call__, lambda layer, x, y: y.size + x.size * 8 * 8)
        patch.setattr(nnx.Linear, "__call__", linear)  # it takes the mean over 8 × 8 pixels
        graph, state = nnx.split(network)
        jax.eval_shape(lambda state, images: nnx.merge(graph, state)(images), state, images)
    return total


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_parameters_and_flops_are_those_that_were_published(name, variant):
    config = dataclasses.replace(CONFIGS[name], conv=CONVS[variant], num_classes=100)
    network = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    network.eval()
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    counted = count(network, images)
    parameters, flops = PUBLISHED[name][variant]
    assert round(counted.parameters / 1e6, 2) == parameters
    assert round((counted.multiply_adds + elementwise(network, images)) / 1e6, 2) == flops
