"""Networks that take their convolution as an argument."""

from chansel_jax.networks.resnet import ResNet, ResNetConfig, resnet14, resnet18

__all__ = ["ResNet", "ResNetConfig", "resnet14", "resnet18"]
