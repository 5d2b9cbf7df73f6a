"""`experiments.train` with a network that is compiled in half the time, for tests."""

from chansel_jax.resnet import PRESETS, ResNet, ResNetConfig


def shallow(conv, num_classes=3, *, width=16, dropout_rate=0.2, rngs, **options) -> ResNet:
    """A ResNet-14 with one block in each stage."""
    config = ResNetConfig(
        conv=conv,
        num_classes=num_classes,
        blocks=(1, 1, 1),
        width=width,
        stem="plain",
        dropout_rate=dropout_rate,
        **options,
    )
    return ResNet(config, rngs=rngs)


SHALLOW = {"resnet14": shallow}

if __name__ == "__main__":
    from experiments import train
    from experiments.command_line import run
    from experiments.settings import RECIPES, Settings

    PRESETS.update(SHALLOW)
    run(train.main, Settings, "train", RECIPES)
