"""Channel selection convolution in JAX and Flax."""

from chansel_jax.conv import ChannelSelectionConv, SubKernelConv
from chansel_jax.networks.resnet import ResNet, ResNetConfig, resnet14, resnet18

__all__ = [
    "ChannelSelectionConv",
    "ResNet",
    "ResNetConfig",
    "SubKernelConv",
    "resnet14",
    "resnet18",
]
