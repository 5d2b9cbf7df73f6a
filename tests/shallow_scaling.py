"""`experiments.scaling` with a network that is compiled in a third of the time, for tests."""

from shallow import shallow

from chansel_jax.networks.resnet import PRESETS
from experiments import scaling

if __name__ == "__main__":
    PRESETS["resnet14"] = shallow
    scaling.run(scaling.main, scaling.Settings, "scaling")
