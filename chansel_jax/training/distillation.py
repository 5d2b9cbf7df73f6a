"""What a trained network makes of an image, as part of another network's target.

Hinton et al., "Distilling the Knowledge in a Neural Network" (2015).
"""

import dataclasses
import math

import jax
import optax
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Distillation:
    """How much the teacher, which is the dense network, counts."""

    distillation_weight: float = 0.9
    """The loss is this share of the teacher's, and for the rest that of the labels; with 0 nothing
    is trained with the teacher."""
    temperature: float = 4.0
    """The logits of both networks are divided by this before the teacher's loss is taken."""

    def __post_init__(self):
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"distillation_weight={self.distillation_weight} must be in [0, 1]")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature} must be positive and finite")


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A trained network that another one learns from.

    Attributes:
        network: takes the same images, and has the same classes.
        distillation: how much it counts.
    """

    network: nnx.Module
    distillation: Distillation = Distillation()


def distillation_loss(
    logits: jax.Array, teacher_logits: jax.Array, temperature: float
) -> jax.Array:
    """The divergence of the softened probabilities from the teacher's, for each image.

    It is multiplied by the square of the temperature, so that its gradients stay of the size of the
    cross-entropy's, whatever the temperature is.

    Args:
        logits: `(N, num_classes)`.
        teacher_logits: likewise.
        temperature: what both are divided by.

    Returns:
        `(N,)`, of the dtype of the logits, and 0 where both networks agree.
    """
    log_probabilities, log_targets = (
        jax.nn.log_softmax(each / temperature) for each in (logits, teacher_logits)
    )
    divergence = optax.losses.kl_divergence_with_log_targets(log_probabilities, log_targets)
    return temperature**2 * divergence
