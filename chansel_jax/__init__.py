"""Channel selection convolution in JAX and Flax."""

from chansel_jax.conv import ChannelSelectionConv, SubKernelConv
from chansel_jax.memory import keep_freed_memory
from chansel_jax.networks.resnet import ResNet, ResNetConfig, resnet14, resnet18
from chansel_jax.ops.lowerings import lowering

__all__ = [
    "ChannelSelectionConv",
    "ResNet",
    "ResNetConfig",
    "SubKernelConv",
    "keep_freed_memory",
    "lowering",
    "resnet14",
    "resnet18",
]
