"""`experiments.scaling` with a network that is compiled at once, for tests."""

from flax import nnx

from chansel_jax.resnet import ResNet, ResNetConfig
from experiments import scaling
from experiments.benchmarking import parallel


def tiny_network(conv, *, rngs: nnx.Rngs) -> ResNet:
    config = ResNetConfig(conv=conv, num_classes=3, blocks=(1,), width=16, stem="plain")
    return ResNet(config, rngs=rngs)


PRESETS = {"resnet14": tiny_network}

if __name__ == "__main__":
    parallel.PRESETS = PRESETS
    scaling.run(scaling.main, scaling.Settings, "scaling")
