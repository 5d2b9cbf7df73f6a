"""Distillation against PyTorch, and the training step against a gradient written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from chansel_jax import SubKernelConv, resnet14
from chansel_jax.functional import apply_function, network_tree
from chansel_jax.training import devices
from chansel_jax.training.augmentation import Augmentation, normalise
from chansel_jax.training.batches import Batch
from chansel_jax.training.distillation import Distillation, Teacher, distillation_loss
from chansel_jax.training.step import init_state, init_totals, make_train_step

LOGITS, TEACHERS = np.random.default_rng(0).normal(0, 3, (2, 5, 4)).astype(np.float32)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_is_that_of_pytorch(temperature):
    found = distillation_loss(jnp.asarray(LOGITS), jnp.asarray(TEACHERS), temperature)
    student, teacher = (
        torch.log_softmax(torch.from_numpy(each) / temperature, -1) for each in (LOGITS, TEACHERS)
    )
    divergence = torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="none")
    np.testing.assert_allclose(found, temperature**2 * divergence.sum(-1), rtol=1e-4, atol=1e-5)


def test_loss_by_hand():
    """Softened, 2 · ln 3 and 0 are 3/4 and 1/4; so the divergence from 1/2 and 1/2 is known."""
    teacher = jnp.array([[2 * np.log(3), 0.0]])
    divergence = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    found = distillation_loss(jnp.zeros((1, 2)), teacher, 2.0)
    np.testing.assert_allclose(found, [4 * divergence], rtol=1e-5)
    np.testing.assert_allclose(distillation_loss(teacher, teacher, 2.0), [0], atol=1e-6)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"distillation_weight": 1.5}, r"distillation_weight=1.5 must be in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive and finite"),
        ({"temperature": np.inf}, "temperature=inf must be positive and finite"),
    ],
)
def test_wrong_settings(given, message):
    with pytest.raises(ValueError, match=message):
        Distillation(**given)


def test_step_follows_both_losses():
    given = {"blocks": (1,), "width": 4, "dropout_rate": 0.0}
    network = resnet14(**given, rngs=nnx.Rngs(0))
    teacher = resnet14(SubKernelConv, **given, rngs=nnx.Rngs(1))
    tree, of_teacher = network_tree(network), network_tree(teacher)
    rng = np.random.default_rng(0)
    batch = Batch(rng.integers(0, 256, (4, 8, 8, 3), np.uint8), np.arange(4, dtype=np.int32) % 3)
    mean, std = np.full(3, 120, np.float32), np.full(3, 60, np.float32)
    images = normalise(jnp.asarray(batch.images), mean, std)
    targets, _ = apply_function(teacher, train=False)(*of_teacher.values(), images, None)
    forward = apply_function(network, train=True)

    def loss(params):
        logits, _ = forward(params, tree["batch_stats"], images, jax.random.key(0))
        of_labels = -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), batch.labels])
        soft, wanted = jax.nn.log_softmax(logits / 3), jax.nn.softmax(targets / 3)
        divergence = jnp.sum(wanted * (jnp.log(wanted) - soft), axis=-1)
        return 0.25 * of_labels + 0.75 * 9 * jnp.mean(divergence)

    gradients = jax.jit(jax.grad(loss))(tree["params"])
    mesh, optimizer = devices.data_mesh(jax.local_devices()[:1]), optax.sgd(1.0)
    step = make_train_step(
        network,
        optimizer,
        mesh=mesh,
        augmentation=Augmentation(crop_padding=0, flip=False),
        teacher=Teacher(teacher, Distillation(0.75, 3.0)),
    )
    state = init_state(network, optimizer, 0, mesh)
    after, _ = step(state, init_totals(mesh), batch, mean, std, of_teacher)
    expected = jax.tree.map(jnp.subtract, tree["params"], gradients)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5),
        after.params,
        expected,
    )
