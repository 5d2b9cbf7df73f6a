"""`experiments.scaling` with a network that is compiled at once, for tests."""

import functools

from shallow import shallow

from chansel_jax.resnet import PRESETS
from experiments import scaling

tiny_network = functools.partial(shallow, blocks=(1,))

if __name__ == "__main__":
    PRESETS["resnet14"] = tiny_network
    scaling.run(scaling.main, scaling.Settings, "scaling")
