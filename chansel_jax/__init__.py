"""Channel selection convolution in JAX and Flax."""

from chansel_jax.conv import (
    ChannelSelectionConv,
    SubKernelConv,
    SubspaceChannelSelectionConv,
)
from chansel_jax.memory import keep_freed_memory
from chansel_jax.networks.resnet import (
    ResNet,
    ResNetConfig,
    cifar_resnet,
    make_network,
    resnet14,
    resnet18,
    wide_resnet,
)
from chansel_jax.ops.lowerings import lowering

__all__ = [
    "ChannelSelectionConv",
    "ResNet",
    "ResNetConfig",
    "SubKernelConv",
    "SubspaceChannelSelectionConv",
    "cifar_resnet",
    "keep_freed_memory",
    "lowering",
    "make_network",
    "resnet14",
    "resnet18",
    "wide_resnet",
]
