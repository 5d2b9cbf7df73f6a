"""Optimisers, learning-rate schedules and weight decay, all optax's."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import DictKey

from chansel_jax.ops.selection import composed_kernel
from chansel_jax.training.branches import SCALES, branched, is_kernel

Undecayed = Literal["biases", "norms", "depthwise"]


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """How the parameters are updated."""

    optimizer: Literal["adamw", "sgd", "muon"] = "adamw"
    """adamw has decoupled weight decay; sgd has momentum, and weight decay added to the gradient;
    muon orthogonalises the momentum of dense and pointwise kernels, and is AdamW for all others."""
    learning_rate: float = 5e-3
    """The learning rate is never higher than this."""
    schedule: Literal["cosine", "constant", "step"] = "cosine"
    """After the warm-up the learning rate falls to zero along a cosine, or stays, or falls in steps
    (after `step_epochs`)."""
    warmup_fraction: float = 0.05
    """The learning rate rises from zero over this share of all steps."""
    step_epochs: tuple[int, ...] = (100, 150, 180)
    """A schedule in steps divides the learning rate by ten after each of these epochs."""
    momentum: float = 0.9
    """SGD has this momentum; the other optimisers have their own."""
    weight_decay: float = 0.05
    """The weight decay is this strong."""
    clip_norm: float = 0.0
    """Gradients whose norm, over all parameters, is larger than this are scaled down to it; 0
    leaves them as they are."""
    undecayed: tuple[Undecayed, ...] = ("biases", "norms")
    """These have no weight decay: any of biases, norms and depthwise (kernels)."""
    decay_composed: bool = False
    """Of channel selection the composed kernel decays, by its own norm, instead of each of its two
    parts."""
    branches: int = 1
    """Each kernel of a convolution is trained as the mean of this many, which have a scale for
    every output channel; the network has the mean."""

    def __post_init__(self):
        if self.branches < 1:
            raise ValueError(f"branches={self.branches} must be at least 1")
        if self.branches > 1 and self.decay_composed:
            raise ValueError(f"branches={self.branches} must be 1 with decay_composed=True")
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be finite")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        for name in ("weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("warmup_fraction", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1)")
        if (
            list(self.step_epochs) != sorted(set(self.step_epochs))
            or min(self.step_epochs, default=1) < 1
        ):
            given = ",".join(map(str, self.step_epochs))
            raise ValueError(f"step_epochs={given} must be positive and increasing")
        unknown = set(self.undecayed) - {"biases", "norms", "depthwise"}
        if unknown:
            raise ValueError(
                f"undecayed={','.join(self.undecayed)} may name biases, norms and depthwise only"
            )


def make_schedule(
    settings: OptimizerSettings, *, epochs: int, steps_per_epoch: int
) -> optax.Schedule:
    """The learning rate as a function of the step, counted from 0.

    Raises:
        ValueError: if `settings.schedule` is unknown.
    """
    total = epochs * steps_per_epoch
    warmup = min(round(settings.warmup_fraction * total), total - 1)
    peak = settings.learning_rate
    match settings.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, total - warmup)
        case "constant":
            after = optax.constant_schedule(peak)
        case "step":
            after = optax.piecewise_constant_schedule(
                peak, {e * steps_per_epoch - warmup: 0.1 for e in settings.step_epochs}
            )
        case other:
            raise ValueError(f"schedule={other!r} must be cosine, constant or step")
    if not warmup:
        return after
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def accumulated(
    optimizer: optax.GradientTransformation, steps: int
) -> optax.GradientTransformation:
    """`optimizer`, called at every step, but updating once in `steps`, by the mean gradient."""
    return optimizer if steps == 1 else optax.MultiSteps(optimizer, steps).gradient_transformation()


def make_optimizer(
    settings: OptimizerSettings, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """The optimiser that `settings` describe, at the learning rate of `schedule`.

    Raises:
        ValueError: if `settings.optimizer` is unknown.
    """
    optimizer = _unclipped(settings, schedule)
    if settings.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)
    return optimizer if settings.branches == 1 else branched(optimizer, settings.branches)


def _unclipped(
    settings: OptimizerSettings, schedule: optax.Schedule
) -> optax.GradientTransformation:
    match settings.optimizer:
        case "adamw":
            return optax.chain(
                optax.scale_by_adam(),
                _decay(settings, settings.weight_decay),
                optax.scale_by_learning_rate(schedule),
            )
        case "sgd":
            return optax.chain(
                _decay(settings, settings.weight_decay),
                optax.sgd(schedule, momentum=settings.momentum),
            )
        case "muon":
            return optax.chain(
                # At the rate 1 it returns minus the direction, on the scale of AdamW's by Liu et
                # al., "Muon is Scalable for LLM Training" (2025). Its own decay of what it leaves
                # to Adam has no mask.
                optax.contrib.muon(
                    1.0,
                    # Optax's own, which would be float64 where JAX has it; they are saved.
                    ns_coeffs=np.array((3.4445, -4.7750, 2.0315), np.float32),
                    muon_weight_dimension_numbers=as_matrices,
                    consistent_rms=0.2,
                ),
                _decay(settings, -settings.weight_decay),
                optax.scale_by_schedule(schedule),
            )
        case other:
            raise ValueError(f"optimizer={other!r} must be adamw, sgd or muon")


def _decay(settings: OptimizerSettings, strength: float) -> optax.GradientTransformation:
    """Adds `strength` times the parameters that decay, or what `composed_decay` makes of them."""

    def mask(params: Any) -> Any:
        return decayed(params, settings.undecayed)

    if not settings.decay_composed:
        return optax.add_decayed_weights(strength, mask)

    def update(updates: Any, params: Any) -> Any:
        def add(update, decay, decays):
            return update + strength * decay if decays else update

        return jax.tree.map(add, updates, composed_decay(params), mask(params))

    return optax.stateless(update)


def composed_decay(params: Any) -> Any:
    """The gradient of half the squared norm of all kernels; a tree like `params`.

    Of ordinary kernels, and of all other parameters, that is the parameter itself. Of the two parts
    of a channel selection it is the gradient by way of the dense kernel that they compose, so that
    the norm of what is computed decays: the Frobenius decay of Khodak et al., "Initialization and
    Regularization of Factorized Neural Layers" (2021). If one of the two is not among `params`, as
    when it is frozen, the other decays by itself.

    Raises:
        ValueError: if there is a channel selection from a subspace, which has three parts.
    """
    found, tree = jax.tree_util.tree_flatten_with_path(params)
    leaves = {tuple(key.key for key in path if isinstance(key, DictKey)): x for path, x in found}
    for *owner, name in list(leaves):
        if name == "subspace":
            raise ValueError(f"decay_composed=True: {'.'.join([*owner, name])} is of a subspace")
        if name == "depthwise" and (*owner, "pointwise") in leaves:
            parts = {name: leaves[*owner, name] for name in ("pointwise", "depthwise")}
            gradients = jax.grad(lambda parts: jnp.sum(composed_kernel(**parts) ** 2) / 2)(parts)
            leaves |= {(*owner, name): gradient for name, gradient in gradients.items()}
    return tree.unflatten(leaves.values())


def as_matrices(params: Any) -> Any:
    """A tree like `params`: how Muon is to read dense and pointwise kernels as matrices, else None.

    The rows are what is summed over, the columns the output channels. The classifier and depthwise
    kernels, whose output channels have nothing in common, are left out.
    """

    def axes(path: tuple, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        name = path[-1].key
        if is_kernel(name, leaf) and name != "depthwise":
            *rows, columns = range(leaf.ndim)
            return optax.contrib.MuonDimensionNumbers(tuple(rows), columns)
        return None

    return jax.tree_util.tree_map_with_path(axes, params)


def decayed(params: Any, undecayed: tuple[Undecayed, ...]) -> Any:
    """A tree like `params` that is True where weight decay applies.

    `norms` are the scales and biases of normalisation layers (modules named `norm…` or `…_norm`)
    and the scales of branches, `biases` all other biases, `depthwise` the depthwise kernels of
    channel selection.
    """

    def is_decayed(path: tuple, _: jax.Array) -> bool:
        *owners, name = [entry.key for entry in path if isinstance(entry, DictKey)]
        owner = str(owners[-1]) if owners else ""
        if owner.startswith("norm") or owner.endswith("_norm") or owner == SCALES:
            return "norms" not in undecayed
        return {"bias": "biases", "depthwise": "depthwise"}.get(name, "others") not in undecayed

    return jax.tree_util.tree_map_with_path(is_decayed, params)
