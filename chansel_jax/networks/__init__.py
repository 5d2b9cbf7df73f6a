"""Networks that take their convolution as an argument."""

from chansel_jax.networks.resnet import (
    ResNet,
    ResNetConfig,
    cifar_resnet,
    make_network,
    resnet14,
    resnet18,
    wide_resnet,
)

__all__ = [
    "ResNet",
    "ResNetConfig",
    "cifar_resnet",
    "make_network",
    "resnet14",
    "resnet18",
    "wide_resnet",
]
