"""Trains a network on images, saves it, and reports.

    python -m experiments.train --conv=chansel

trains channel selection on the embedded silhouettes. A run lives in its --workdir; the same
command, typed again, goes on where the run stopped.
"""

from experiments.cli.command import run
from experiments.cli.console import make_console
from experiments.cluster.joining import join
from experiments.training.config_file import read_config
from experiments.training.run import train_and_evaluate
from experiments.training.settings import RECIPES, Settings


def main(settings: Settings) -> None:
    """Trains as `settings` say, and prints how it goes."""
    join(settings.cluster)
    train_and_evaluate(settings, make_console())


if __name__ == "__main__":
    run(main, Settings, "train", RECIPES, read_config)
