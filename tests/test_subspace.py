"""Channel selection from a subspace: against the package bsconv, as a dense kernel, by hand."""

import functools
import inspect

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from bsconv.pytorch import BSConvS
from flax import nnx

from chansel_jax import ChannelSelectionConv, SubKernelConv, SubspaceChannelSelectionConv
from chansel_jax.conv import lowerings_taken, subspace_size
from chansel_jax.functional import network_tree, orthonormal_loss_function
from chansel_jax.training import devices, step
from chansel_jax.training.augmentation import Augmentation
from chansel_jax.training.batches import Batch


def drawn(key, shape, dtype):
    """An initialiser in NumPy, which compiles nothing."""
    return jax.device_put(np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype))


def made(*sizes, **options):
    return SubspaceChannelSelectionConv(
        *sizes, kernel_init=drawn, bias_init=drawn, rngs=nnx.Rngs(0), **options
    )


def bsconv_twin(layer, norm):
    """The layer of the package with the same weights, in float64."""
    twin = BSConvS(
        layer.in_features,
        layer.out_features,
        layer.kernel_size,
        stride=layer.strides,
        padding=1,
        p=layer.share,
        with_bn=norm,
    ).double()
    arrays = {
        "pw1": layer.subspace[...].T[:, :, None, None],
        "pw2": layer.pointwise[...].T[:, :, None, None],
        "dw": layer.depthwise[...].transpose(3, 2, 0, 1),
    }
    with torch.no_grad():
        for name, array in arrays.items():
            getattr(twin, name).weight.copy_(torch.tensor(np.asarray(array)))
        twin.dw.bias.copy_(torch.tensor(np.asarray(layer.bias[...])))
    return twin


@pytest.mark.parametrize(
    ("sizes", "share", "options"),
    [
        ((16, 8, (3, 3)), 0.25, {}),  # two products
        ((3, 8, (3, 3)), 0.25, {"strides": 2}),  # one, with both matrices multiplied
        ((16, 8, (3, 3)), 0.5, {"norm": True}),
    ],
)
def test_outputs_and_gradients_are_those_of_bsconv(sizes, share, options):
    with jax.enable_x64(True):
        layer = made(*sizes, padding=1, share=share, param_dtype=jnp.float64, **options)
        twin = bsconv_twin(layer, "norm" in options)
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2, 6, 5, sizes[0]))
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        rest = jax.tree.map(lambda statistic: statistic.astype(jnp.float64), rest)

        def loss(params, x):
            layer = nnx.merge(graph, params, rest, copy=True)
            y = layer(x)
            return jnp.sum(jnp.sin(y)) + layer.orthonormal_loss(), y

        gradients, y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, x)

    torch_x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    expected = twin(torch_x)
    (expected.sin().sum() + twin._reg_loss()).backward()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    close(y, expected.detach().numpy().transpose(0, 2, 3, 1))
    close(gradients[1], torch_x.grad.numpy().transpose(0, 2, 3, 1))
    for name, torch_name in (("subspace", "pw1"), ("pointwise", "pw2")):
        close(gradients[0][name][...], getattr(twin, torch_name).weight.grad[:, :, 0, 0].T)
    close(gradients[0]["depthwise"][...], twin.dw.weight.grad.permute(2, 3, 1, 0))


def test_the_package_s_own_sizes():
    for inputs in (1, 3, 5, 16, 17, 100):
        for share in (0.1, 0.25, 0.5, 1.0):
            twin = BSConvS(inputs, 2, 3, p=share)
            assert subspace_size(inputs, share) == twin.pw1.out_channels


@hypothesis.settings(max_examples=5, derandomize=True, deadline=None, database=None)
@hypothesis.given(
    groups=st.sampled_from((1, 1, 2)),
    channels=st.tuples(st.integers(1, 12), st.integers(1, 6)),
    rank=st.integers(1, 3),
    share=st.sampled_from((0.25, 0.5, 1.0)),
    padding=st.sampled_from(("SAME", "VALID", "CIRCULAR", 1)),
    kernel_size=st.sampled_from(((3,), (2, 3))),
)
def test_it_is_the_dense_convolution_of_its_composed_kernel(
    groups, channels, rank, share, padding, kernel_size
):
    inputs, outputs = (groups * count for count in channels)
    rank = min(rank, subspace_size(channels[0], share))
    options = {"padding": padding, "feature_group_count": groups}
    layer = made(inputs, outputs, kernel_size, rank=rank, share=share, **options)
    twin = nnx.Conv(inputs, outputs, kernel_size, **options, rngs=nnx.Rngs(0))
    twin.kernel[...], twin.bias[...] = layer.composed_kernel(), layer.bias[...]
    x = drawn(None, (2, *(5,) * len(kernel_size), inputs), jnp.float32)
    y, expected = layer(x), twin(x)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(y / scale, expected / scale, rtol=0, atol=1e-5)


def test_by_hand():
    layer = made(5, 1, (1, 1), use_bias=False)
    assert (layer.subspace.shape, layer.pointwise.shape) == ((5, 4), (4, 1))
    layer.subspace[...] = jnp.eye(5, 4) + jnp.eye(5, 4, k=-1)  # sums of neighbours
    layer.pointwise[...] = jnp.array([[1.0], [10], [100], [1000]])
    layer.depthwise[...] = jnp.full((1, 1, 1, 1), 2.0)
    x = jnp.array([[[[1.0, 2, 3, 4, 5]]]])
    assert layer(x).item() == 2 * (3 + 50 + 700 + 9000)
    # Wᵀ·W has 2 on the diagonal and 1 beside it: with I taken off, 4 · 1 + 6 · 1 under the root.
    assert layer.orthonormal_loss() == pytest.approx(10**0.5)


def test_orthonormal_channels_have_neither_loss_nor_gradient():
    layer = made(8, 4, (3, 3), feature_group_count=2)
    assert layer.subspace.shape == (4, 8)
    layer.subspace[...] = jnp.tile(jnp.eye(4), (1, 2))

    graph, params = nnx.split(layer)
    value, gradient = jax.value_and_grad(lambda p: nnx.merge(graph, p).orthonormal_loss())(params)
    assert value == 0
    assert (gradient["subspace"][...] == 0).all()


def test_arguments_are_those_of_channel_selection():
    theirs, ours = (
        inspect.signature(kind.__init__).parameters
        for kind in (ChannelSelectionConv, SubspaceChannelSelectionConv)
    )
    *shared, share = ours.items()
    assert [(n, p.kind, p.default) for n, p in shared] == [
        (n, p.kind, p.default) for n, p in theirs.items()
    ]
    assert share[0] == "share" and share[1].default == 0.25


def test_parameters_and_their_metadata():
    sharding = {"out_sharding": (None, None, "from", "to")}
    options = {"rank": 2, "norm": True, "param_dtype": jnp.bfloat16, "kernel_metadata": sharding}
    with nnx.use_eager_sharding(False):
        layer = made(np.int64(40), 6, (3, 3), **options)
    shapes = {
        ".".join(path): leaf[...].shape
        for path, leaf in nnx.to_flat_state(nnx.state(layer, nnx.Param))
    }
    assert shapes == {
        "subspace": (40, 10),
        "pointwise": (10, 12),
        "depthwise": (3, 3, 2, 6),
        "bias": (6,),
        "subspace_norm.scale": (10,),
        "subspace_norm.bias": (10,),
        "norm.scale": (12,),
        "norm.bias": (12,),
    }
    assert layer.in_features == 40 and layer.subspace.dtype == jnp.bfloat16
    assert layer.subspace.out_sharding == ("from", None)
    assert layer.pointwise.out_sharding == (None, "to")
    assert layer.depthwise.out_sharding == (None, None, None, "to")


def test_initial_kernels_have_the_variance_of_a_dense_one():
    layer = SubspaceChannelSelectionConv(64, 400, (3, 3), rngs=nnx.Rngs(0))
    assert float(layer.composed_kernel().var()) == pytest.approx(1 / (64 * 9), rel=0.1)
    assert set(lowerings_taken(layer, jnp.float32)) == {SubspaceChannelSelectionConv}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("share", 0.0),
        ("share", 1.5),
        ("share", float("nan")),
        ("feature_group_count", 3),
        ("rank", 5),
        ("lowering", "fast"),
    ],
)
def test_wrong_argument(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        made(8, 8, (3, 3), **{name: value})


class Small(nnx.Module):
    """A layer of a subspace within another module, and one that has none."""

    def __init__(self):
        self.inner = nnx.List([made(5, 4, (3, 3)), SubKernelConv(4, 2, (1, 1), rngs=nnx.Rngs(0))])

    def __call__(self, x, *, rngs=None):
        for layer in self.inner:
            x = layer(x)
        return x.mean((1, 2))


def test_a_training_step_minimises_the_orthonormal_loss_too():
    network, mesh = Small(), devices.data_mesh(jax.devices()[:1])
    layer = network.inner[0]
    before = network_tree(network)["params"]
    loss = orthonormal_loss_function(network)
    assert loss(before) == pytest.approx(0.1 * float(layer.orthonormal_loss()))
    assert orthonormal_loss_function(network.inner[1]) is None

    # Black images have no other gradient of the subspace.
    batch = Batch(images=np.zeros((2, 4, 4, 5), np.uint8), labels=np.array([0, 1], np.int32))
    optimizer = optax.sgd(0.5)
    take = step.make_train_step(
        network, optimizer, mesh=mesh, augmentation=Augmentation(0, flip=False)
    )
    state = step.init_state(network, optimizer, seed=0, mesh=mesh)
    state, totals = take(state, step.init_totals(mesh), batch, jnp.zeros(5), jnp.ones(5))
    expected = layer.subspace[...] - 0.5 * jax.grad(loss)(before)["inner"][0]["subspace"]
    np.testing.assert_allclose(state.params["inner"][0]["subspace"], expected, rtol=1e-5)
    # The loss that is reported is the cross-entropy alone.
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(
        network(jnp.zeros((2, 4, 4, 5))), batch.labels
    )
    assert float(totals.loss) == pytest.approx(float(cross_entropy.sum()), rel=1e-5)
