"""The training step, the evaluation and their state: pure functions under `jax.jit`.

Everything runs over a mesh of all devices of all processes, data-parallel: batches are sharded, the
state is replicated, BatchNorm sees the whole batch. How the images of a batch are cropped and
mirrored, and what dropout drops, depends on the seed and the step alone.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from chansel_jax.functional import (
    Tree,
    apply_function,
    network_tree,
    orthonormal_loss_function,
)
from chansel_jax.training.augmentation import (
    Augmentation,
    augmented,
    mixed,
    normalise,
    with_reversed,
)
from chansel_jax.training.batches import Batch
from chansel_jax.training.devices import everywhere, replicate
from chansel_jax.training.distillation import Teacher, distillation_loss

NO_STEP = np.iinfo(np.int32).max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and the key that decides its randomness.

    Attributes:
        params: the network's parameters, a tree of nested dicts.
        batch_stats: running means and variances of BatchNorm, likewise.
        opt_state: the optimiser's state.
        step: steps taken so far, int32.
        key: data of the random key `(2,)` uint32; constant over a run.
        ema: exponential moving averages of `params` and `batch_stats`, under these names, if the
            step keeps some.
    """

    params: Tree
    batch_stats: Tree
    opt_state: Tree
    step: jax.Array
    key: jax.Array
    ema: dict[str, Tree] | None = None

    @property
    def evaluated(self) -> dict[str, Tree]:
        """The `params` and `batch_stats` of the network that is evaluated: the averages, if any."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over images, and the first step whose loss was not finite (else `NO_STEP`).

    `correct_top5` counts those whose label has one of the five largest logits, if that is counted.
    """

    loss: jax.Array
    correct: jax.Array
    count: jax.Array
    bad_step: jax.Array
    correct_top5: jax.Array | None = None

    def add(self, logits: jax.Array, labels: jax.Array, mask: jax.Array | bool) -> "Totals":
        """Adds images, of logits `(N, C)` and labels `(N,)`, where `mask` `(N,)` is True."""
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels
        mask = jnp.broadcast_to(mask, labels.shape)
        correct_top5 = self.correct_top5
        if correct_top5 is not None:
            correct_top5 += jnp.sum(in_top5(logits, labels) & mask, dtype=jnp.int32)
        return dataclasses.replace(
            self,
            correct_top5=correct_top5,
            loss=self.loss + jnp.sum(jnp.where(mask, losses, 0)),
            correct=self.correct + jnp.sum(correct & mask, dtype=jnp.int32),
            count=self.count + jnp.sum(mask, dtype=jnp.int32),
        )


def in_top5(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Whether each label `(N,)` has one of the five largest of its logits `(N, C)`.

    Of equal ones the first is the larger, as for `argmax`. None is where they are not numbers.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    earlier = jnp.arange(logits.shape[-1])[None] < labels[:, None]
    larger = ~(logits <= own) | ((logits == own) & earlier)
    return (jnp.sum(larger, axis=-1, dtype=jnp.int32) < 5) & ~jnp.isnan(own[:, 0])


def init_state(
    network: nnx.Module,
    optimizer: optax.GradientTransformation,
    seed: int,
    mesh: Mesh,
    *,
    ema: bool = False,
) -> TrainState:
    """The state before the first step, with the parameters of `network`, on every device.

    With `ema` they are the averages too.
    """
    tree = network_tree(network)
    state = TrainState(
        **tree,
        opt_state=optimizer.init(tree["params"]),
        step=jnp.int32(0),
        key=jax.random.key_data(jax.random.key(seed)),
        ema=tree if ema else None,
    )
    # A copy, since the training step consumes its state and the network keeps its arrays.
    return replicate(jax.tree.map(jnp.copy, state), mesh)


def abstract_state(
    network: nnx.Module,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    ema: bool = False,
) -> TrainState:
    """The shapes of `init_state`, to compile for; the arrays of `network` are not used."""
    tree = abstract_tree(network, mesh)
    state = TrainState(
        **tree,
        opt_state=jax.eval_shape(optimizer.init, tree["params"]),
        step=jax.ShapeDtypeStruct((), jnp.int32),
        key=jax.ShapeDtypeStruct((2,), jnp.uint32),
        ema=tree if ema else None,
    )
    return jax.tree.map(lambda leaf: leaf.update(sharding=everywhere(mesh)), state)


def abstract_tree(network: nnx.Module, mesh: Mesh) -> Tree:
    """The shapes of `network_tree`, on every device; the arrays of `network` are not used."""
    tree = jax.eval_shape(lambda tree: tree, network_tree(network))
    return jax.tree.map(lambda leaf: leaf.update(sharding=everywhere(mesh)), tree)


def init_totals(mesh: Mesh, *, top5: bool = False) -> Totals:
    """Totals of no image, on every device; with `top5` they count `correct_top5`."""
    totals = Totals(
        loss=jnp.float32(0),
        correct=jnp.int32(0),
        count=jnp.int32(0),
        bad_step=jnp.int32(NO_STEP),
        correct_top5=jnp.int32(0) if top5 else None,
    )
    return replicate(totals, mesh)


def make_train_step(
    network: nnx.Module,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    augmentation: Augmentation,
    label_smoothing: float = 0.0,
    teacher: Teacher | None = None,
    ema: float = 0.0,
    accumulate: int = 1,
) -> Callable[..., tuple[TrainState, Totals]]:
    """The jitted step `(state, totals, batch, mean, std) -> (state, totals)`.

    It consumes (donates) `state`. Its `Batch` is sharded as `batch_sharding` says; `mean` and `std`
    are the channels' statistics `(C,)` float32 over the training images. With a teacher it takes,
    as its last argument, what `network_tree` makes of the teacher's network. The totals hold the
    cross-entropy without label smoothing, and nothing of a teacher; of an image that is mixed of
    two they count the label with the larger share. The orthonormal losses of layers that select
    from a subspace are added to what is minimised.

    Args:
        network: gives the structure; its arrays are not used.
        optimizer: updates the parameters.
        mesh: the devices, from `data_mesh`.
        augmentation: how the images are varied. Where it mixes them, within a batch (a part of one
            if gradients are accumulated), the targets are mixed likewise.
        label_smoothing: share of the target spread evenly over all classes.
        teacher: sees the same images, varied as they are; its network gives the structure, its
            arrays are not used. None by default.
        ema: decay of the moving averages, which the state then has. 0 (the default) keeps none.
        accumulate: how many steps `optimizer` takes for an update; the averages move once in it.
    """
    apply = apply_function(network, train=True)
    orthonormal_loss = orthonormal_loss_function(network)
    teach = teacher and apply_function(teacher.network, train=False)

    def train_step(state, totals, batch, mean, std, *of_teacher):
        _, steps_key = jax.random.split(jax.random.wrap_key_data(state.key))
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(steps_key, state.step))
        with jax.named_scope("augmentation"):  # scopes are what a profile shows
            images, labels, own_share = _varied(augmentation, augment_key, batch, mean, std)
        if teacher is not None:
            (tree,) = of_teacher
            with jax.named_scope("teacher"):
                teacher_logits, _ = teach(tree["params"], tree["batch_stats"], images, None)

        def loss_function(params):
            logits, batch_stats = apply(params, state.batch_stats, images, dropout_key)
            loss = _cross_entropy(logits, batch.labels, own_share, label_smoothing)
            if teacher is not None:
                how = teacher.distillation
                divergence = distillation_loss(logits, teacher_logits, how.temperature)
                share = how.distillation_weight
                loss = (1 - share) * loss + share * jnp.mean(divergence)
            if orthonormal_loss is not None:
                loss += orthonormal_loss(params)
            return loss, (logits, batch_stats)

        (loss, (logits, batch_stats)), gradients = jax.value_and_grad(loss_function, has_aux=True)(
            state.params
        )
        # Optax computes with several dtypes, which JAX may have been told to refuse.
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        totals = totals.add(logits, labels, True)
        bad_step = jnp.where(jnp.isfinite(loss), NO_STEP, state.step)
        totals = dataclasses.replace(totals, bad_step=jnp.minimum(totals.bad_step, bad_step))
        changed = {"params": params, "batch_stats": batch_stats, "opt_state": opt_state}
        if ema:
            with jax.named_scope("ema"):
                now = {"params": params, "batch_stats": batch_stats}
                changed["ema"] = moved(state.ema, now, state.step + 1, ema, accumulate)
        return dataclasses.replace(state, step=state.step + 1, **changed), totals

    return jax.jit(train_step, donate_argnums=0, out_shardings=everywhere(mesh))


def _varied(
    augmentation: Augmentation, key: jax.Array, batch: Batch, mean: jax.Array, std: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The images as the network sees them, the labels that count, and the share of an image's own.

    The share is None where no images are mixed.
    """
    images = augmented(augmentation, key, batch.images, mean, std)
    if not augmentation.mixes:
        return images, batch.labels, None
    # `augmented` has made keys below 4 of this one.
    images, own_share = mixed(augmentation, jax.random.fold_in(key, 4), images)
    return images, jnp.where(own_share >= 0.5, batch.labels, batch.labels[::-1]), own_share


def _cross_entropy(
    logits: jax.Array, labels: jax.Array, own_share: jax.Array | None, label_smoothing: float
) -> jax.Array:
    """The mean over a batch, whose targets are mixed as its images are."""
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    if own_share is not None:
        one_hot = with_reversed(one_hot, own_share.astype(one_hot.dtype))
    targets = optax.smooth_labels(one_hot, label_smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits, targets))


def moved(averages: Tree, now: Tree, steps: jax.Array, decay: float, accumulate: int = 1) -> Tree:
    """Exponential moving averages after a step.

    After the update `n`, counted from 1, the decay is `min(decay, (1 + n) / (10 + n))`, as in
    TensorFlow: so the average is soon free of the parameters that a training begins with.

    Args:
        averages: before it.
        now: a tree like `averages`: what they are of.
        steps: how many have been taken, with this one; int32.
        decay: what the averages keep of themselves in the long run.
        accumulate: how many steps an update takes; between updates the averages stay.
    """
    updates = (steps // accumulate).astype(jnp.float32)
    share = 1 - jnp.minimum(decay, (1 + updates) / (10 + updates))
    share = jnp.where(steps % accumulate == 0, share, 0)
    return optax.incremental_update(now, averages, share)


def make_evaluate(network: nnx.Module, *, mesh: Mesh) -> Callable[..., Totals]:
    """The jitted function `(state, totals, batch, count, mean, std) -> totals`.

    It consumes (donates) `totals`, and adds the first `count` images of a `Batch`, which is sharded
    as `batch_sharding` says; the others only fill it up. The network has the parameters of
    `TrainState.evaluated`.
    """
    apply = apply_function(network, train=False)

    def evaluate(state, totals, batch, count, mean, std):
        images = normalise(batch.images, mean, std)
        logits, _ = apply(**state.evaluated, images=images, dropout_key=None)
        mask = jnp.arange(len(batch.labels), dtype=jnp.int32) < count
        return totals.add(logits, batch.labels, mask)

    return jax.jit(evaluate, donate_argnums=1, out_shardings=everywhere(mesh))
