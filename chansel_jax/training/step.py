"""The training step, the evaluation and their state: pure functions under `jax.jit`.

Everything runs over a mesh of all devices of all processes, data-parallel: batches are sharded, the
state is replicated, BatchNorm sees the whole batch. Images are uint8, a whole data set on the
devices or one batch at a time. Which images a step takes, how they are cropped and mirrored, and
what dropout drops depend on the seed and the step alone.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh

from chansel_jax.data import Split
from chansel_jax.functional import Tree, apply_function, network_tree
from chansel_jax.training.augmentation import Augmentation, cutout, normalise, random_crop_flip
from chansel_jax.training.devices import batch_sharding, check_batch_size, everywhere, replicate

NO_STEP = np.iinfo(np.int32).max


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "batch_stats", "opt_state", "step", "key"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes, and the key that decides its randomness.

    Attributes:
        params: the network's parameters, a tree of nested dicts.
        batch_stats: running means and variances of BatchNorm, likewise.
        opt_state: the optimiser's state.
        step: steps taken so far, int32.
        key: data of the random key `(2,)` uint32; constant over a run.
    """

    params: Tree
    batch_stats: Tree
    opt_state: Tree
    step: jax.Array
    key: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["loss", "correct", "count", "bad_step"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over images, and the first step whose loss was not finite (else `NO_STEP`)."""

    loss: jax.Array
    correct: jax.Array
    count: jax.Array
    bad_step: jax.Array

    def add(self, losses: jax.Array, correct: jax.Array, mask: jax.Array | bool) -> "Totals":
        """Adds the images `(N,)` of a batch where `mask` is True."""
        mask = jnp.broadcast_to(mask, losses.shape)
        return dataclasses.replace(
            self,
            loss=self.loss + jnp.sum(jnp.where(mask, losses, 0)),
            correct=self.correct + jnp.sum(correct & mask),
            count=self.count + jnp.sum(mask),
        )


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["images", "labels", "mean", "std"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class DeviceSplit:
    """A split of a data set on every device of a mesh.

    Attributes:
        images: `(N, H, W, C)` uint8.
        labels: `(N,)` int32.
        mean: `(C,)` float32, the channels' means over the training images.
        std: `(C,)` float32, their standard deviations.
    """

    images: jax.Array
    labels: jax.Array
    mean: jax.Array
    std: jax.Array


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["images", "labels"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Batch:
    """What a step takes.

    Attributes:
        images: `(N, H, W, C)` uint8.
        labels: `(N,)` int32.
    """

    images: jax.Array
    labels: jax.Array


def put_split(split: Split, mean: np.ndarray, std: np.ndarray, mesh: Mesh) -> DeviceSplit:
    """`split` on every device of `mesh`, with the statistics that normalise it."""
    return replicate(DeviceSplit(split.images, split.labels, mean, std), mesh)


def init_state(
    network: nnx.Module, optimizer: optax.GradientTransformation, seed: int, mesh: Mesh
) -> TrainState:
    """The state before the first step, with the parameters of `network`, on every device."""
    tree = network_tree(network)
    state = TrainState(
        **tree,
        opt_state=optimizer.init(tree["params"]),
        step=jnp.int32(0),
        key=jax.random.key_data(jax.random.key(seed)),
    )
    # A copy, since the training step consumes its state and the network keeps its arrays.
    return replicate(jax.tree.map(jnp.copy, state), mesh)


def init_totals(mesh: Mesh) -> Totals:
    """Totals of no image, on every device."""
    return replicate(_zero_totals(), mesh)


@functools.partial(jax.jit, static_argnames="count")
def epoch_order(key: jax.Array, epoch: int, count: int) -> jax.Array:
    """The order `(count,)` int32 in which an epoch, counted from 0, visits `count` images.

    Args:
        key: that of the `TrainState`.
        epoch: which one.
        count: of the training images.
    """
    order_key, _ = jax.random.split(jax.random.wrap_key_data(key))
    key = jax.random.fold_in(order_key, epoch)
    return jax.random.permutation(key, count).astype(jnp.int32)


def make_train_step(
    network: nnx.Module,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    batch_size: int,
    steps_per_epoch: int,
    augmentation: Augmentation,
    label_smoothing: float = 0.0,
) -> Callable[[TrainState, Totals, DeviceSplit, jax.Array], tuple[TrainState, Totals]]:
    """The jitted step `(state, totals, split, order) -> (state, totals)`.

    It takes the `batch_size` images that are next in `order`, and consumes (donates) `state`. The
    totals hold the cross-entropy without label smoothing.

    Args:
        network: gives the structure; its arrays are not used.
        optimizer: updates the parameters.
        mesh: the devices, from `data_mesh`.
        batch_size: images a step over all devices.
        steps_per_epoch: steps before a new `order` begins.
        augmentation: how the images are varied.
        label_smoothing: share of the target spread evenly over all classes.

    Raises:
        ValueError: if `batch_size` is not divisible by the devices.
    """
    check_batch_size(batch_size, mesh)
    update = _update_function(network, optimizer, augmentation, label_smoothing)

    def train_step(state, totals, split, order):
        first = state.step % steps_per_epoch * batch_size
        index = lax.dynamic_slice_in_dim(order, first, batch_size)
        index = lax.with_sharding_constraint(index, batch_sharding(mesh))
        batch = Batch(split.images[index], split.labels[index])
        return update(state, totals, batch, split.mean, split.std)

    return jax.jit(train_step, donate_argnums=0, out_shardings=everywhere(mesh))


def make_batch_step(
    network: nnx.Module,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    augmentation: Augmentation,
    label_smoothing: float = 0.0,
) -> Callable[..., tuple[TrainState, Totals]]:
    """The jitted step `(state, totals, batch, mean, std) -> (state, totals)`.

    As that of `make_train_step`, for images that are not on the devices: it is given its `Batch`,
    sharded as `batch_sharding` says, and the channels' statistics `(C,)`.
    """
    update = _update_function(network, optimizer, augmentation, label_smoothing)
    return jax.jit(update, donate_argnums=0, out_shardings=everywhere(mesh))


def _update_function(
    network: nnx.Module,
    optimizer: optax.GradientTransformation,
    augmentation: Augmentation,
    label_smoothing: float,
) -> Callable[..., tuple[TrainState, Totals]]:
    apply = apply_function(network, train=True)

    def update(state, totals, batch, mean, std):
        _, steps_key = jax.random.split(jax.random.wrap_key_data(state.key))
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(steps_key, state.step))
        with jax.named_scope("augmentation"):  # scopes are what a profile shows
            images = random_crop_flip(
                augment_key,
                batch.images,
                padding=augmentation.crop_padding,
                flip=augmentation.flip,
            )
            images = normalise(images, mean, std)
            # `split` in the function above has made the keys 0 and 1 of this one.
            images = cutout(jax.random.fold_in(augment_key, 2), images, size=augmentation.cutout)

        def loss_function(params):
            logits, batch_stats = apply(params, state.batch_stats, images, dropout_key)
            one_hot = jax.nn.one_hot(batch.labels, logits.shape[-1])
            targets = optax.smooth_labels(one_hot, label_smoothing)
            loss = jnp.mean(optax.softmax_cross_entropy(logits, targets))
            return loss, (logits, batch_stats)

        (loss, (logits, batch_stats)), gradients = jax.value_and_grad(loss_function, has_aux=True)(
            state.params
        )
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
        totals = totals.add(*_losses_and_correct(logits, batch.labels), True)
        bad_step = jnp.where(jnp.isfinite(loss), NO_STEP, state.step)
        totals = dataclasses.replace(totals, bad_step=jnp.minimum(totals.bad_step, bad_step))
        state = TrainState(
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            step=state.step + 1,
            key=state.key,
        )
        return state, totals

    return update


def make_evaluate(
    network: nnx.Module, *, mesh: Mesh, batch_size: int
) -> Callable[[TrainState, DeviceSplit], Totals]:
    """The jitted evaluation `(state, split) -> totals` over every image of a split.

    The last batch is padded and the padding masked, so that no image is left out or counted twice.

    Raises:
        ValueError: if `batch_size` is not divisible by the devices.
    """
    check_batch_size(batch_size, mesh)
    add = _count_function(network)

    def evaluate(state, split):
        count = len(split.labels)

        def add_batch(number, totals):
            index = number * batch_size + jnp.arange(batch_size)
            index = lax.with_sharding_constraint(index, batch_sharding(mesh))
            taken = jnp.minimum(index, count - 1)
            batch = Batch(split.images[taken], split.labels[taken])
            return add(state, totals, batch, index < count, split.mean, split.std)

        return lax.fori_loop(0, -(-count // batch_size), add_batch, _zero_totals())

    return jax.jit(evaluate, out_shardings=everywhere(mesh))


def make_batch_evaluate(network: nnx.Module, *, mesh: Mesh) -> Callable[..., Totals]:
    """The jitted function `(state, totals, batch, mask, mean, std) -> totals`.

    It adds those images of a `Batch` where `mask` `(N,)` is True; both are sharded as
    `batch_sharding` says.
    """
    return jax.jit(_count_function(network), donate_argnums=1, out_shardings=everywhere(mesh))


def _count_function(network: nnx.Module) -> Callable[..., Totals]:
    apply = apply_function(network, train=False)

    def add(state, totals, batch, mask, mean, std):
        images = normalise(batch.images, mean, std)
        logits, _ = apply(state.params, state.batch_stats, images, None)
        return totals.add(*_losses_and_correct(logits, batch.labels), mask)

    return add


def _zero_totals() -> Totals:
    return Totals(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.int32(NO_STEP))


def _losses_and_correct(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, jnp.argmax(logits, axis=-1) == labels


def load_state(network: nnx.Module, state: TrainState) -> None:
    """Gives `network` the parameters and batch statistics of `state`."""
    nnx.update(network, state.params, state.batch_stats)
