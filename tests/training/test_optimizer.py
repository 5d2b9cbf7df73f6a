"""Schedules by hand, the optimisers against PyTorch's, and which parameters decay."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from chansel_jax import (
    ChannelSelectionConv,
    SubKernelConv,
    SubspaceChannelSelectionConv,
    resnet14,
)
from chansel_jax.functional import network_tree
from chansel_jax.training.optimizer import (
    OptimizerSettings,
    accumulated,
    as_matrices,
    composed_decay,
    decayed,
    make_optimizer,
    make_schedule,
)

KINDS = ("biases", "norms", "depthwise")
CHOICES = [(), *((kind,) for kind in KINDS), ("biases", "norms"), KINDS]


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def rates(settings, steps, *, epochs=10, steps_per_epoch=4):
    schedule = make_schedule(settings, epochs=epochs, steps_per_epoch=steps_per_epoch)
    return [float(schedule(step)) for step in steps]


# Schedules


@pytest.mark.parametrize("schedule", ["cosine", "constant", "step"])
def test_warm_up_rises_evenly_to_the_peak(schedule):
    settings = OptimizerSettings(schedule=schedule, learning_rate=2.0, warmup_fraction=0.1)
    np.testing.assert_allclose(rates(settings, range(5)), [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)


def test_warm_up_of_half_an_epoch_takes_half_its_steps():
    settings = OptimizerSettings(schedule="constant", learning_rate=3.0, warmup_fraction=0.05)
    np.testing.assert_allclose(rates(settings, range(4)), [1, 2, 3, 3], rtol=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "constant", "step"])
def test_without_warm_up_the_first_step_has_the_peak(schedule):
    settings = OptimizerSettings(schedule=schedule, learning_rate=0.5, warmup_fraction=0)
    assert rates(settings, [0]) == [0.5]


def test_cosine_falls_from_the_end_of_warm_up_to_zero_at_the_end_of_training():
    settings = OptimizerSettings(schedule="cosine", learning_rate=1.0, warmup_fraction=0.1)
    # 36 steps after the warm-up: a third, half and two thirds of them, the last, and the end.
    last = (1 + np.cos(np.pi * 35 / 36)) / 2
    np.testing.assert_allclose(
        rates(settings, [4, 16, 22, 28, 39, 40]), [1, 0.75, 0.5, 0.25, last, 0], atol=1e-6
    )


def test_constant_stays_at_the_peak():
    settings = OptimizerSettings(schedule="constant", learning_rate=0.3, warmup_fraction=0.1)
    np.testing.assert_allclose(rates(settings, range(4, 41)), 0.3, rtol=1e-6)


@pytest.mark.parametrize("warmup_fraction", [0, 0.1, 0.25])
def test_step_divides_by_ten_after_epochs_counted_from_the_start_of_training(warmup_fraction):
    settings = OptimizerSettings(
        schedule="step", learning_rate=2.0, warmup_fraction=warmup_fraction, step_epochs=(3, 5)
    )
    np.testing.assert_allclose(
        rates(settings, [11, 12, 19, 20, 39]), [2, 0.2, 0.2, 0.02, 0.02], rtol=1e-6
    )


def test_step_without_epochs_stays():
    settings = OptimizerSettings(schedule="step", learning_rate=2.0, step_epochs=())
    assert rates(settings, [8, 39]) == [2.0, 2.0]


@pytest.mark.parametrize("warmup_fraction", [0.975, 0.999])
def test_warm_up_leaves_at_least_one_step(warmup_fraction):
    settings = OptimizerSettings(learning_rate=4.0, warmup_fraction=warmup_fraction)
    np.testing.assert_allclose(rates(settings, [38, 39]), [4 * 39 / 40, 4], rtol=1e-6)


# Settings


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", -0.1),
        ("learning_rate", float("inf")),
        ("warmup_fraction", -1.0),
        ("warmup_fraction", float("nan")),
        ("weight_decay", float("nan")),
        ("momentum", 1.0),
        ("momentum", float("nan")),
        ("step_epochs", (0, 3)),
        ("step_epochs", (3, 3)),
    ],
)
def test_bad_setting_is_named_with_its_value(name, value):
    with pytest.raises(ValueError) as raised:
        OptimizerSettings(**{name: value})
    given = ",".join(map(str, value)) if isinstance(value, tuple) else value
    assert f"{name}={given} must " in str(raised.value)


def test_unknown_kind_of_parameters_is_named():
    with pytest.raises(ValueError, match="undecayed=norms,kernels may name"):
        OptimizerSettings(undecayed=("norms", "kernels"))


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="schedule='linear' must be"):
        make_schedule(OptimizerSettings(schedule="linear"), epochs=10, steps_per_epoch=4)


def test_unknown_optimizer_is_named():
    with pytest.raises(ValueError, match="optimizer='adam' must be"):
        make_optimizer(OptimizerSettings(optimizer="adam"), optax.constant_schedule(1.0))


# Optimisers

LEAVES = {
    ("conv1", "pointwise"): ((4, 6), "others"),
    ("conv1", "depthwise"): ((3, 3, 1, 6), "depthwise"),
    ("conv1", "bias"): ((6,), "biases"),
    ("shortcut_norm", "scale"): ((6,), "norms"),
    ("shortcut_norm", "bias"): ((6,), "norms"),
}


def twin_optimizer(settings, parameters):
    """PyTorch's optimiser of `settings`; `parameters` are pairs of a tensor and whether it decays.

    Its learning rate has to be set before each step.
    """
    groups = [
        {"params": [tensor], "weight_decay": settings.weight_decay if decays else 0.0}
        for tensor, decays in parameters
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum)
    return torch.optim.AdamW(groups)


def nested(values):
    tree = {}
    for (owner, name), value in values.items():
        tree.setdefault(owner, {})[name] = jnp.asarray(value)
    return tree


@pytest.mark.parametrize("undecayed", [(), ("biases", "norms"), ("depthwise",)], ids=",".join)
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.0},
        {"optimizer": "adamw"},
    ],
    ids=["sgd with momentum", "sgd", "adamw"],
)
def test_steps_equal_those_of_pytorch(settings, undecayed, x64):
    settings = OptimizerSettings(
        **settings, learning_rate=0.1, warmup_fraction=1 / 3, weight_decay=0.3, undecayed=undecayed
    )
    rng = np.random.default_rng(0)
    initial = {path: rng.normal(size=shape) for path, (shape, _) in LEAVES.items()}
    gradients = [
        {path: rng.normal(size=shape) for path, (shape, _) in LEAVES.items()} for _ in range(5)
    ]
    schedule = make_schedule(settings, epochs=3, steps_per_epoch=2)

    params = nested(initial)
    optimizer = make_optimizer(settings, schedule)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(nested(gradient), state, params)
        params = optax.apply_updates(params, updates)

    tensors = {path: torch.tensor(value) for path, value in initial.items()}
    twin = twin_optimizer(
        settings, [(tensors[path], kind not in undecayed) for path, (_, kind) in LEAVES.items()]
    )
    for step, gradient in enumerate(gradients):
        for path, tensor in tensors.items():
            tensor.grad = torch.tensor(gradient[path])
        for group in twin.param_groups:
            group["lr"] = float(schedule(step))
        twin.step()

    for (owner, name), tensor in tensors.items():
        np.testing.assert_allclose(params[owner][name], tensor.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3])
def test_composed_decay_is_that_of_the_dense_kernel(rank, x64):
    """By PyTorch, through a sum over the ranks that is written out."""
    rng = np.random.default_rng(0)
    shapes = {"pointwise": (5, 4 * rank), "depthwise": (3, 2, rank, 4), "bias": (4,)}
    layer = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    others = {"scale": rng.normal(size=4), "kernel": rng.normal(size=(3, 3, 2, 4))}
    found = composed_decay({"conv": jax.tree.map(jnp.asarray, layer), "others": others})
    parts = {name: torch.tensor(layer[name], requires_grad=True) for name in layer}
    kernel = sum(
        parts["pointwise"].reshape(5, 4, rank)[None, None, :, :, r]
        * parts["depthwise"][:, :, r][:, :, None, :]
        for r in range(rank)
    )
    (kernel.pow(2).sum() / 2).backward()
    for name in ("pointwise", "depthwise"):
        np.testing.assert_allclose(found["conv"][name], parts[name].grad.numpy(), rtol=1e-12)
    np.testing.assert_array_equal(found["conv"]["bias"], layer["bias"])
    chex.assert_trees_all_equal(found["others"], others)


def test_composed_decay_by_hand():
    """The kernel of the output is the outer product of (3, 4) and (2): its norm squared is 100."""
    layer = {"pointwise": jnp.array([[3.0], [4.0]]), "depthwise": jnp.full((1, 1, 1, 1), 2.0)}
    found = composed_decay(layer)
    np.testing.assert_allclose(found["pointwise"], [[3 * 4], [4 * 4]])
    np.testing.assert_allclose(found["depthwise"], [[[[2 * 25]]]])


def test_composed_decay_of_other_parts():
    """What is frozen is not among the parameters; three parts make another kernel."""
    alone = {"a": {"pointwise": jnp.ones((2, 3))}, "b": {"depthwise": jnp.ones((3, 3, 1, 2))}}
    chex.assert_trees_all_equal(composed_decay(alone), alone)
    layer = SubspaceChannelSelectionConv(8, 6, (3, 3), rngs=nnx.Rngs(0))
    params = {"blocks": {"conv": network_tree(layer)["params"]}}
    with pytest.raises(ValueError, match="decay_composed=True: blocks.conv.subspace is of a sub"):
        composed_decay(params)


def test_composed_decay_in_flax_s_optimiser():
    layer = ChannelSelectionConv(1, 1, (1, 1), use_bias=False, rngs=nnx.Rngs(0))
    layer.pointwise[...], layer.depthwise[...] = jnp.full((1, 1), 3.0), jnp.full((1, 1, 1, 1), 2.0)
    settings = OptimizerSettings("sgd", weight_decay=0.5, momentum=0, decay_composed=True)
    transformation = make_optimizer(settings, optax.constant_schedule(0.1))
    optimizer = nnx.Optimizer(layer, transformation, wrt=nnx.Param)
    optimizer.update(layer, jax.tree.map(jnp.zeros_like, nnx.state(layer, nnx.Param)))
    found = float(layer.pointwise[0, 0]), float(layer.depthwise[0, 0, 0, 0])
    assert found == pytest.approx((3 - 0.05 * 3 * 4, 2 - 0.05 * 2 * 9))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("undecayed", [(), ("biases", "depthwise")], ids=",".join)
def test_each_optimiser_decays_the_composed_kernel(optimizer, undecayed):
    """Without gradients nothing but the decay moves the parameters."""
    rng = np.random.default_rng(0)
    params = nested({path: rng.normal(size=shape) for path, (shape, _) in LEAVES.items()})
    params = jax.tree.map(jnp.float32, params)
    settings = OptimizerSettings(
        optimizer, weight_decay=0.3, undecayed=undecayed, decay_composed=True
    )
    optimizer = make_optimizer(settings, optax.constant_schedule(0.1))
    updates, _ = jax.jit(optimizer.update)(
        jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
    )
    expected = jax.tree.map(
        lambda decay, decays: -0.03 * decay * decays,
        composed_decay(params),
        decayed(params, undecayed),
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("clip_norm", [0.5, 100.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_gradients_are_clipped_as_pytorch_does(clip_norm, steps):
    """The mean of those that are accumulated."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(2, 7)).astype(np.float32)
    settings = OptimizerSettings(
        optimizer="sgd", momentum=0.0, weight_decay=0.0, clip_norm=clip_norm
    )
    optimizer = accumulated(make_optimizer(settings, optax.constant_schedule(1.0)), steps)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    state = optimizer.init(params)
    for gradient in gradients[:steps]:
        updates, state = optimizer.update({"a": gradient[:3], "b": gradient[3:]}, state, params)
    tensors = [torch.zeros(3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    mean = gradients[:steps].mean(0)
    for tensor, part in zip(tensors, (mean[:3], mean[3:]), strict=True):
        tensor.grad = torch.tensor(part)
    torch.nn.utils.clip_grad_norm_(tensors, clip_norm)
    for found, tensor in zip((updates["a"], updates["b"]), tensors, strict=True):
        np.testing.assert_allclose(found, -tensor.grad.numpy(), rtol=1e-5)


def test_a_clipped_gradient_by_hand():
    """(3, 4) has the norm 5, and becomes (0.6, 0.8)."""
    settings = OptimizerSettings(optimizer="sgd", momentum=0.0, weight_decay=0.0, clip_norm=1.0)
    optimizer = make_optimizer(settings, optax.constant_schedule(1.0))
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    chex.assert_trees_all_close(updates, {"a": jnp.array([-0.6]), "b": jnp.array([-0.8])})


# Muon

CUBES = {  # path, shape, and the shape of the matrix that is orthogonalised, if any
    ("conv1", "kernel"): ((3, 3, 2, 4), (18, 4)),
    ("conv2", "pointwise"): ((4, 6), (4, 6)),
    ("conv2", "depthwise"): ((3, 3, 1, 6), None),
    ("norm1", "scale"): ((6,), None),
    ("dense", "kernel"): ((6, 3), None),
    ("dense", "bias"): ((3,), None),
}


def orthogonalised(matrix):
    """Five steps of Newton and Schulz, as Jordan's polynomial of the singular values."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return left * values @ right


def ahead(moment, gradient, decay, step):
    """Nesterov's look ahead along an average of gradients that began at 0, `step` from 1."""
    after = decay * moment / (1 - decay ** (step + 1))
    return after + (1 - decay) * gradient / (1 - decay**step)


def muon_direction(gradients, matrix):
    """Of the last of some gradients of a parameter; Adam's where it is no matrix."""
    decay = 0.9 if matrix is None else 0.95
    first, second = np.zeros_like(gradients[0]), np.zeros_like(gradients[0])
    for gradient in gradients:
        first = decay * first + (1 - decay) * gradient
        second = 0.999 * second + 0.001 * gradient**2
    count = len(gradients)
    looked = ahead(first, gradients[-1], decay, count)
    if matrix is None:
        return looked / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
    return 0.2 * np.sqrt(max(matrix)) * orthogonalised(looked.reshape(matrix)).reshape(looked.shape)


@pytest.mark.parametrize("undecayed", [(), ("biases", "norms"), ("depthwise",)], ids=",".join)
def test_muon_orthogonalises_kernels_and_leaves_the_others_to_adam(undecayed, x64):
    settings = OptimizerSettings(
        optimizer="muon",
        learning_rate=0.1,
        warmup_fraction=1 / 3,
        weight_decay=0.3,
        undecayed=undecayed,
    )
    schedule = make_schedule(settings, epochs=3, steps_per_epoch=2)
    rng = np.random.default_rng(0)
    wanted = {path: rng.normal(size=shape) for path, (shape, _) in CUBES.items()}
    params = nested(wanted)
    optimizer = make_optimizer(settings, schedule)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    decays = nnx.traversals.flatten_mapping(decayed(params, undecayed))
    gradients = {path: [] for path in CUBES}
    for step in range(4):
        for path, (shape, matrix) in CUBES.items():
            gradients[path].append(rng.normal(size=shape))
            direction = muon_direction(gradients[path], matrix)
            direction = direction + 0.3 * decays[path] * wanted[path]
            wanted[path] = wanted[path] - float(schedule(step)) * direction
        newest = nested({path: of_path[-1] for path, of_path in gradients.items()})
        updates, state = update(newest, state, params)
        params = optax.apply_updates(params, updates)
    for (owner, name), value in wanted.items():
        np.testing.assert_allclose(params[owner][name], value, rtol=0, atol=1e-6)


def test_first_step_of_muon_is_that_of_pytorch():
    rng = np.random.default_rng(0)
    weight, gradient = rng.normal(size=(2, 8, 5)).astype(np.float32)
    settings = OptimizerSettings(optimizer="muon", learning_rate=0.5, weight_decay=0.1)
    optimizer = make_optimizer(settings, optax.constant_schedule(0.5))
    params = {"conv": {"pointwise": jnp.asarray(weight)}}
    updates, _ = optimizer.update(
        {"conv": {"pointwise": jnp.asarray(gradient)}}, optimizer.init(params), params
    )
    tensor = torch.tensor(weight)
    tensor.grad = torch.tensor(gradient)
    torch.optim.Muon([tensor], lr=0.5, weight_decay=0.1, adjust_lr_fn="match_rms_adamw").step()
    # It computes in bfloat16.
    after = optax.apply_updates(params, updates)["conv"]["pointwise"]
    np.testing.assert_allclose(after, tensor.numpy(), rtol=0, atol=0.01)


@pytest.mark.parametrize("conv", [ChannelSelectionConv, SubKernelConv])
def test_muon_takes_every_dense_and_pointwise_kernel_of_a_network(conv):
    network = nnx.eval_shape(lambda: resnet14(conv, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    found = nnx.traversals.flatten_mapping(as_matrices(params))
    assert {path[-1] for path, axes in found.items() if axes} <= {"kernel", "pointwise"}
    assert sum(axes is not None for axes in found.values()) == 15  # stem, 6 · 2, 2 shortcuts
    assert found["classifier", "kernel"] is None


# Weight decay


@pytest.fixture(
    scope="module",
    params=[
        (ChannelSelectionConv, (16, 28, 14)),
        (functools.partial(ChannelSelectionConv, norm=True), (16, 56, 14)),
        (SubKernelConv, (16, 28, 0)),
    ],
    ids=["chansel", "chansel with norm", "subkernel"],
)
def network_and_counts(request):
    """A network without arrays, and how many of its leaves are biases, norms and depthwise."""
    conv, counts = request.param
    build = functools.partial(resnet14, conv, use_bias=True)
    return nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))), dict(zip(KINDS, counts, strict=True))


def kinds_of_leaves(network):
    """The kind of each parameter by its path, told by the modules that hold them."""
    kinds = {}
    for path, module in nnx.iter_modules(network):
        for name, value in vars(module).items():
            if isinstance(value, nnx.Param):
                kind = {"bias": "biases", "depthwise": "depthwise"}.get(name, "others")
                kinds[*path, name] = "norms" if isinstance(module, nnx.BatchNorm) else kind
    return kinds


@pytest.mark.parametrize("undecayed", CHOICES, ids=",".join)
def test_named_kinds_of_a_network_do_not_decay(network_and_counts, undecayed):
    network, counts = network_and_counts
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    decays = nnx.traversals.flatten_mapping(decayed(params, undecayed))
    assert decays == {path: k not in undecayed for path, k in kinds_of_leaves(network).items()}
    assert list(decays.values()).count(False) == sum(counts[kind] for kind in undecayed)


def test_parameters_of_a_layer_alone_are_told_apart():
    layer = nnx.eval_shape(lambda: ChannelSelectionConv(2, 3, (3, 3), norm=True, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert decayed(params, ("biases", "norms")) == {
        "pointwise": True,
        "depthwise": True,
        "bias": False,
        "norm": {"scale": False, "bias": False},
    }


# Accumulation


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_accumulated_gradients_update_once_in_a_while_by_their_mean(optimizer):
    settings = OptimizerSettings(optimizer=optimizer, weight_decay=0.1)
    schedule = make_schedule(settings, epochs=1, steps_per_epoch=3)
    params = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
    gradients = np.random.default_rng(0).normal(size=(3, 4, 2, 3)).astype(np.float32)

    def trained(optimizer, gradients):
        found, current, state = [], params, optimizer.init(params)
        update = jax.jit(optimizer.update)
        for gradient in gradients:
            updates, state = update({"dense": {"kernel": gradient}}, state, current)
            current = optax.apply_updates(current, updates)
            found.append(current["dense"]["kernel"])
        return np.stack(found)

    plain = make_optimizer(settings, schedule)
    expected = trained(plain, gradients.mean(axis=1))
    found = trained(accumulated(plain, 4), gradients.reshape(12, 2, 3))
    np.testing.assert_allclose(found[3::4], expected, rtol=1e-5)
    for part in (0, 1, 2):
        np.testing.assert_array_equal(found[4 + part :: 4], found[3::4][:-1])
    assert accumulated(plain, 1) is plain
