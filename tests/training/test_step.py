import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from chansel_jax import ChannelSelectionConv, SubKernelConv, resnet14
from chansel_jax.data import Split
from chansel_jax.data.summary import summarise
from chansel_jax.digest import digest
from chansel_jax.functional import apply_function
from chansel_jax.torch_weights import from_torch, to_numpy
from chansel_jax.training import devices
from chansel_jax.training.augmentation import Augmentation, mixed, normalise
from chansel_jax.training.batches import Batch, GivenOrder, TrainingOrder, epoch_order, take
from chansel_jax.training.optimizer import (
    OptimizerSettings,
    accumulated,
    make_optimizer,
    make_schedule,
)
from chansel_jax.training.step import (
    NO_STEP,
    abstract_state,
    in_top5,
    init_state,
    init_totals,
    make_evaluate,
    make_train_step,
    moved,
)
from experiments.pytorch.networks import torch_twin

STILL = Augmentation(crop_padding=0, flip=False)


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (37, 8, 8, 3), np.uint8)
    return Split(images, rng.integers(0, 3, 37).astype(np.int32))


def small_network(conv=ChannelSelectionConv, blocks=(1,), dropout_rate=0.0):
    return resnet14(conv, blocks=blocks, width=4, dropout_rate=dropout_rate, rngs=nnx.Rngs(0))


def one_device():
    return devices.data_mesh(jax.local_devices()[:1])


class Run:
    """A network's step and evaluation over one mesh."""

    def __init__(self, split, network=None, *, optimizer=None, mesh=None, seed=0, **options):
        self.mesh = mesh or devices.data_mesh()
        self.network = network or small_network()
        optimizer = optimizer or optax.sgd(0.1)
        self.step = make_train_step(
            self.network,
            optimizer,
            mesh=self.mesh,
            **{"augmentation": Augmentation(), **options},
        )
        self.split = devices.replicate(Batch(split.images, split.labels), self.mesh)
        self.statistics = devices.replicate((split.summary.mean, split.summary.std), self.mesh)
        self.first_state = functools.partial(init_state, self.network, optimizer, seed, self.mesh)

    def arguments(self, state):
        """What a step takes besides the state and the totals."""
        order = TrainingOrder(np.asarray(state.key), 37, batch_size=16, steps_per_epoch=2)
        return take(self.split, order(int(state.step)), self.mesh), *self.statistics

    def take(self, steps, state=None):
        """State after `steps` steps and each step's mean loss."""
        state = state or self.first_state()
        losses, totals = [], init_totals(self.mesh)
        for _ in range(steps):
            state, totals = self.step(state, totals, *self.arguments(state))
            losses.append(float(totals.loss))
        return state, np.diff(losses, prepend=0) / 16, jax.device_get(totals)


@pytest.fixture(scope="module")
def run(split):
    return Run(split)


def test_channel_statistics_are_those_of_float64():
    images = np.random.default_rng(1).integers(0, 256, (5, 6, 7, 3), np.uint8)
    images[..., 2] = 9
    summary = summarise(images, np.zeros(5, np.int32))
    mean, std = summary.mean, summary.std
    np.testing.assert_allclose(mean, images.mean((0, 1, 2), np.float64), rtol=1e-6)
    np.testing.assert_allclose(std[:2], images.std((0, 1, 2), np.float64)[:2], rtol=1e-6)
    assert std[2] == 1  # no variation, and no division by zero


def test_mesh_holds_all_local_devices():
    assert devices.data_mesh().size == jax.local_device_count() == 2


def test_step_is_compiled_once(run):
    run.take(3)
    state, _, totals = run.take(5)
    assert run.step._cache_size() == 1  # nor does another placement of the same arrays count
    assert int(state.step) == 5 and int(totals.count) == 80


def test_step_consumes_its_state(run):
    state, totals = run.first_state(), init_totals(run.mesh)
    new, _ = run.step(state, totals, *run.arguments(state))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert int(totals.count) == 0  # these can still be asked for
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(new))
    nnx.state(run.network, nnx.Param)["classifier"]["bias"][...].block_until_ready()  # still there


@pytest.mark.parametrize("conv", [ChannelSelectionConv, SubKernelConv])
def test_three_steps_of_sgd_equal_pytorch(split, conv):
    network = small_network(conv, (1, 1))
    twin = torch_twin("chansel" if conv is ChannelSelectionConv else "subkernel", network.config)
    twin.load_state_dict({k: torch.tensor(v) for k, v in to_numpy(network).items()}, strict=False)
    twin.double()  # in float32 its convolutions are less exact on some processors than the bounds
    settings = OptimizerSettings(optimizer="sgd", weight_decay=0.1, undecayed=())
    run = Run(
        split,
        network,
        optimizer=make_optimizer(settings, optax.constant_schedule(0.01)),
        augmentation=STILL,
        label_smoothing=0.1,
    )
    state = run.first_state()
    orders = [np.asarray(epoch_order(state.key, number // 2, 37)) for number in range(3)]
    state, losses, _ = run.take(3, state)
    images = np.asarray(normalise(split.images, *run.statistics))
    torch_optimizer = torch.optim.SGD(twin.parameters(), 0.01, momentum=0.9, weight_decay=0.1)
    for number, order in enumerate(orders):
        index = order[number % 2 * 16 :][:16]
        logits = twin(torch.tensor(images[index].transpose(0, 3, 1, 2)).double())
        labels = torch.tensor(split.labels[index], dtype=torch.long)
        plain = torch.nn.functional.cross_entropy(logits, labels)
        np.testing.assert_allclose(losses[number], plain.item(), rtol=1e-4)
        torch_optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        torch_optimizer.step()
    expected = small_network(conv, (1, 1))
    from_torch(expected, twin.state_dict())
    params = nnx.to_pure_dict(nnx.state(expected, nnx.Param))
    chex.assert_trees_all_close(state.params, params, atol=1e-5)


def test_two_devices_equal_one(split, run):
    alone = Run(split, run.network, mesh=one_device())
    state, losses, _ = run.take(4)
    other, other_losses, _ = alone.take(4)
    np.testing.assert_allclose(losses, other_losses, rtol=1e-5)
    chex.assert_trees_all_close(
        jax.device_get(state.params), jax.device_get(other.params), atol=1e-5
    )


@pytest.fixture(scope="module")
def dropout_run(split):
    return Run(split, small_network(dropout_rate=0.5))


def test_randomness_depends_on_seed_and_step_alone(dropout_run):
    run = dropout_run
    whole, losses, _ = run.take(4)
    half, first_losses, _ = run.take(2)
    resumed, last_losses, _ = run.take(2, jax.tree.map(jnp.copy, half))
    assert [*first_losses, *last_losses] == pytest.approx(losses, rel=1e-5)
    chex.assert_trees_all_equal(whole.params, resumed.params)
    other, _, _ = run.take(4, init_state(run.network, optax.sgd(0.1), 1, run.mesh))
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(whole.params, other.params)


def test_dropout_and_augmentation_change_the_loss(split, run, dropout_run):
    still = Run(split, augmentation=STILL).take(1)[1]
    cut = Run(split, augmentation=Augmentation(crop_padding=0, flip=False, cutout=3)).take(1)[1]
    cropped, dropped = run.take(1)[1], dropout_run.take(1)[1]
    assert len({loss.item() for loss in (still, cut, cropped, dropped)}) == 4


def test_every_epoch_visits_every_image_in_another_order(run):
    state = run.first_state()
    epochs = [np.asarray(epoch_order(state.key, epoch, 37)) for epoch in (0, 1, 2, 0)]
    for order in epochs:
        np.testing.assert_array_equal(np.sort(order), np.arange(37))
    np.testing.assert_array_equal(epochs[0], epochs[3])
    assert (epochs[0] != epochs[1]).any() and (epochs[1] != epochs[2]).any()


@pytest.mark.parametrize("batch_size", [8, 40])
def test_evaluation_covers_every_image_once(split, run, batch_size):
    evaluate = make_evaluate(run.network, mesh=run.mesh)
    state, totals, order = run.first_state(), init_totals(run.mesh), GivenOrder(37, batch_size)
    for number in range(len(order)):
        batch = take(run.split, order(number), run.mesh)
        totals = evaluate(state, totals, batch, order.new(number), *run.statistics)
    totals = jax.device_get(totals)
    network = nnx.clone(run.network)
    network.eval()
    images = normalise(split.images, split.summary.mean, split.summary.std)
    logits = np.asarray(network(images), np.float64)
    log_sums = np.log(np.exp(logits).sum(axis=1))
    losses = log_sums - logits[np.arange(37), split.labels]
    assert totals.count == 37
    assert totals.correct == (logits.argmax(axis=1) == split.labels).sum()
    np.testing.assert_allclose(totals.loss, losses.sum(), rtol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_averages_are_those_of_numpy(accumulate):
    """After each update, in float64; between updates they stay."""
    rng, decay = np.random.default_rng(0), 0.3
    values = rng.normal(size=(9, 5)).astype(np.float32)
    found, wanted = {"a": jnp.asarray(values[0])}, values[0].astype(np.float64)
    move = jax.jit(functools.partial(moved, decay=decay, accumulate=accumulate))
    for steps, value in enumerate(values[1:], 1):
        found = move(found, {"a": jnp.asarray(value)}, jnp.int32(steps))
        if steps % accumulate == 0:
            updates = steps // accumulate
            keep = min(decay, (1 + updates) / (10 + updates))
            wanted = keep * wanted + (1 - keep) * value
        np.testing.assert_allclose(found["a"], wanted, rtol=1e-5, atol=1e-6)


def test_an_average_by_hand():
    """After the first update the decay is 2 / 11, after the tenth 11 / 20; a lower one is kept."""
    for steps, decay, expected in ((1, 0.9, 9.0), (10, 0.9, 4.95), (10, 0.5, 5.5)):
        found = moved(jnp.float32(0), jnp.float32(11), jnp.int32(steps), decay)
        assert float(found) == pytest.approx(expected, rel=1e-6)


MIXED = dataclasses.replace(STILL, mixup=1.0, cutmix=1.0)


@pytest.fixture(scope="module")
def mixing_run(split, run):
    return Run(split, run.network, augmentation=MIXED, label_smoothing=0.1, mesh=one_device())


def test_step_follows_mixed_targets(run, mixing_run):
    """Written out: a mixed batch, smoothed targets of both labels, plain descent."""
    state = mixing_run.first_state()
    batch, mean, std = mixing_run.arguments(state)
    _, steps_key = jax.random.split(jax.random.wrap_key_data(state.key))
    augment_key, dropout_key = jax.random.split(jax.random.fold_in(steps_key, 0))
    images = normalise(batch.images, mean, std)
    mix = jax.jit(mixed, static_argnums=0)
    images, share = mix(MIXED, jax.random.fold_in(augment_key, 4), images)
    assert 0.02 < share < 0.98
    own, other = (np.eye(3)[each] * 0.9 + 0.1 / 3 for each in (batch.labels, batch.labels[::-1]))
    targets = share * own + (1 - share) * other
    forward = apply_function(run.network, train=True)

    def loss(params):
        logits, _ = forward(params, state.batch_stats, images, dropout_key)
        return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
    larger = np.asarray(batch.labels if share >= 0.5 else batch.labels[::-1])
    correct = (np.argmax(logits, axis=-1) == larger).sum()
    plain = -jax.nn.log_softmax(logits)[np.arange(16), larger].mean()
    state, losses, totals = mixing_run.take(1, state)
    chex.assert_trees_all_close(state.params, expected, rtol=1e-3, atol=1e-5)
    assert totals.correct == correct and losses[0] == pytest.approx(float(plain), rel=1e-4)


def test_mixing_over_two_devices_equals_one(split, run, mixing_run):
    two = Run(split, run.network, augmentation=MIXED, label_smoothing=0.1)
    state, losses, _ = two.take(3)
    other, other_losses, _ = mixing_run.take(3)
    np.testing.assert_allclose(losses, other_losses, rtol=1e-5)
    chex.assert_trees_all_close(
        jax.device_get(state.params), jax.device_get(other.params), atol=1e-5
    )


@pytest.mark.parametrize("classes", [10, 13])
def test_accuracy_among_five_is_that_of_pytorch(classes):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(40, classes)).astype(np.float32), rng.integers(0, classes, 40)
    _, first = torch.tensor(logits).topk(5)
    expected = (first == torch.tensor(labels)[:, None]).any(1).numpy()
    labels = labels.astype(np.int32)
    np.testing.assert_array_equal(in_top5(logits, labels), expected)
    mask = np.arange(40) < 30
    totals = init_totals(devices.data_mesh(), top5=True).add(logits, labels, mask)
    assert totals.correct_top5 == expected[:30].sum() and totals.count == 30


def test_five_largest_by_hand():
    logits = jnp.array([[6.0, 5, 4, 3, 2, 1]] * 3 + [[jnp.nan] * 6])
    assert in_top5(logits, jnp.array([0, 4, 5, 0])).tolist() == [True, True, False, False]
    assert in_top5(logits[2:, :3], jnp.array([2, 2])).tolist() == [True, False]
    among_equals = in_top5(jnp.zeros((7, 7)), jnp.arange(7))
    assert among_equals.tolist() == [True] * 5 + [False] * 2


def test_averages_follow_the_steps_and_are_evaluated(split, run):
    averaging = Run(split, run.network, ema=0.9, accumulate=2)
    averaging.first_state = functools.partial(averaging.first_state, ema=True)
    state = averaging.first_state()
    expected = jax.device_get(state.ema)
    for steps in (1, 2, 3, 4):
        state, *_ = averaging.take(1, state)
        now = jax.device_get({"params": state.params, "batch_stats": state.batch_stats})
        expected = moved(expected, now, jnp.int32(steps), 0.9, 2)
        chex.assert_trees_all_close(jax.device_get(state.ema), expected, rtol=1e-5, atol=1e-6)
    plain, *_ = run.take(4)
    chex.assert_trees_all_equal(state.params, plain.params)
    evaluate = make_evaluate(run.network, mesh=run.mesh)

    def loss(state):
        arguments = run.arguments(run.first_state())
        return float(evaluate(state, init_totals(run.mesh), arguments[0], 16, *arguments[1:]).loss)

    assert loss(state) == loss(dataclasses.replace(plain, **state.ema)) != loss(plain)


def test_first_step_whose_loss_is_not_finite_is_kept(split):
    run = Run(split, optimizer=optax.sgd(optax.piecewise_constant_schedule(0.1, {2: 1e38})))
    assert run.take(3)[2].bad_step == NO_STEP
    # The rate explodes with the update of step 2, so the loss of step 3 is the first to show it.
    assert run.take(5)[2].bad_step == 3


def test_digest_sees_every_name_dtype_shape_and_bit():
    tree = {"a": np.zeros(4, np.float32), "b": np.ones(2, np.float32)}
    variants = [
        tree,
        {"a": tree["b"], "b": tree["a"]},
        {"a": tree["a"].view(np.int32), "b": tree["b"]},
        {"a": tree["a"].reshape(2, 2), "b": tree["b"]},
        {"a": tree["a"], "b": np.nextafter(tree["b"], np.float32(2))},
        {"a": tree["a"], "c": tree["b"]},
    ]
    assert len({digest(variant) for variant in variants}) == len(variants)
    assert digest(tree) == digest(jax.tree.map(jnp.asarray, tree))


@pytest.mark.parametrize(
    ("batch_size", "nearest"), [(13, "12 or 14"), (1, "2"), (0, "2"), (-5, "2")]
)
def test_batch_that_does_not_divide_is_refused(batch_size, nearest):
    with pytest.raises(
        ValueError, match=rf"batch_size={batch_size} must .* 2 devices: take {nearest}$"
    ):
        devices.check_batch_size(batch_size, devices.data_mesh())


@pytest.mark.parametrize("name", ["crop_padding", "cutout"])
def test_negative_pixels_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=-1"):
        Augmentation(**{name: -1})


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("adamw", jnp.bfloat16), ("sgd", jnp.float32), ("muon", jnp.float32)],
)
def test_shapes_and_dtypes_do_not_depend_on_switches_of_jax(optimizer, dtype):
    """Nothing is computed: shapes and dtypes alone."""

    def shapes():
        mesh = one_device()
        network = nnx.eval_shape(lambda: resnet14(blocks=(1, 1), dtype=dtype, rngs=nnx.Rngs(0)))
        settings = OptimizerSettings(optimizer=optimizer)
        schedule = make_schedule(settings, epochs=2, steps_per_epoch=20)
        updates = accumulated(make_optimizer(settings, schedule), 2)
        step = make_train_step(
            network, updates, mesh=mesh, augmentation=Augmentation(cutout=3), label_smoothing=0.1
        )
        state = abstract_state(network, updates, mesh)
        images = jax.ShapeDtypeStruct((4, 8, 8, 3), jnp.uint8)
        batch = Batch(images, jax.ShapeDtypeStruct((4,), jnp.int32))
        statistic = jax.ShapeDtypeStruct((3,), jnp.float32)
        given = state, init_totals(mesh), batch
        after, totals = jax.eval_shape(step, *given, statistic, statistic)
        evaluated = jax.eval_shape(
            make_evaluate(network, mesh=mesh), *given, np.int32(3), statistic, statistic
        )
        order = jax.eval_shape(lambda key: epoch_order(key, 1, 9), state.key)
        found = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves((state, given[1], order))]
        made = jax.tree.leaves((after, totals, evaluated))
        return found, [(leaf.shape, leaf.dtype) for leaf in made]

    expected = shapes()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        assert shapes() == expected
