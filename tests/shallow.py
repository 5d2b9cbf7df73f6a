"""`experiments.train` with a network that is compiled in a third of the time, for tests."""

import sys

from chansel_jax.conv import ChannelSelectionConv
from chansel_jax.networks.resnet import PRESETS, ResNet, ResNetConfig


def shallow(
    conv=ChannelSelectionConv,
    num_classes=3,
    *,
    blocks=(1,),
    width=16,
    dropout_rate=0.2,
    rngs,
    **options,
) -> ResNet:
    """A ResNet-14 of one block."""
    config = ResNetConfig(
        conv=conv,
        num_classes=num_classes,
        blocks=blocks,
        width=width,
        stem="plain",
        dropout_rate=dropout_rate,
        **options,
    )
    return ResNet(config, rngs=rngs)


def arguments(settings, workdir):
    """The flags for the run that the fixture `settings` describes, in another folder."""
    return [
        *("--dataset=folder", f"--data-dir={settings.data.data_dir}", "--width=4"),
        *("--learning-rate=0.01", "--warmup-fraction=0.2", "--batch-size=16", "--epochs=3"),
        f"--workdir={workdir}",
    ]


def command(settings, workdir):
    """That run in a process of its own."""
    return [sys.executable, __file__, *arguments(settings, workdir)]


if __name__ == "__main__":
    from experiments import train
    from experiments.cli.command import run
    from experiments.training.settings import RECIPES, Settings

    # tensorboardX imports PyTorch where that is installed, for seconds.
    sys.modules["torch"] = None
    import tensorboardX  # noqa: F401

    del sys.modules["torch"]
    PRESETS["resnet14"] = shallow
    run(train.main, Settings, "train", RECIPES)
