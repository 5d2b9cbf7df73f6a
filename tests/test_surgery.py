"""Replaced layers against the dense ones, the package `bsconv`, and NumPy."""

import functools

import bsconv.pytorch
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax import lax

from chansel_jax.conv import ChannelSelectionConv, SubKernelConv, SubspaceChannelSelectionConv
from chansel_jax.networks.resnet import ResNet, ResNetConfig
from chansel_jax.surgery import parameter_count, replace_convs
from experiments.pytorch.networks import torch_twin

CONVS = {"nnx": nnx.Conv, "subkernel": SubKernelConv}


def conv(inputs=4, outputs=6, size=(3, 3), kind=nnx.Conv, seed=0, **given):
    def drawn(key, shape, dtype):  # by NumPy, which compiles nothing
        return jax.device_put(np.random.default_rng(seed).standard_normal(shape).astype(dtype))

    return kind(inputs, outputs, size, kernel_init=drawn, rngs=nnx.Rngs(0), **given)


def energy_of(approximation, kernel):
    """The share of `kernel` that its approximation holds, from the distance between the two."""
    return 1 - np.sum((approximation - kernel) ** 2) / np.sum(kernel**2)


# One layer


def test_a_kernel_by_hand():
    """Of the matrix diag(3, 4), (C_in, K), the larger value is kept: 16 of 25 parts."""
    layer = conv(2, 1, (2,), use_bias=False)
    layer.kernel[...] = jnp.array([[[3.0], [0.0]], [[0.0], [4.0]]])
    new, report = replace_convs(layer)
    np.testing.assert_allclose(new.composed_kernel()[..., 0], [[0, 0], [0, 4]], atol=1e-6)
    (row,) = report.rows
    assert (row.path, row.parameters_before, row.parameters_after, row.rank) == ("", 4, 4, 1)
    assert row.energy == pytest.approx(0.64)


@pytest.mark.parametrize("kind", CONVS)
@pytest.mark.parametrize(
    ("shape", "given"),
    [
        ((7, 4), {"size": (3,), "padding": "CAUSAL", "kernel_dilation": 2}),
        ((7, 4), {"size": 3, "strides": None, "padding": "CIRCULAR"}),
        ((6, 7, 4), {"strides": (2, 1), "padding": 1, "use_bias": False}),
        ((6, 7, 4), {"feature_group_count": 2, "padding": "valid", "dtype": jnp.float32}),
        ((5, 6, 4), {"input_dilation": 2, "padding": ((1, 2), (0, 1)), "precision": "highest"}),
        ((4, 5, 3, 4), {"size": (2, 2, 3), "preferred_element_type": jnp.float32}),
    ],
)
def test_full_rank_computes_what_the_dense_layer_does(kind, shape, given):
    layer = conv(kind=CONVS[kind], bias_init=nnx.initializers.normal(), **given)
    new, report = replace_convs(layer, rank=100)
    x = jax.device_put(np.random.default_rng(0).standard_normal((2, *shape)).astype(jnp.float32))
    np.testing.assert_allclose(new(x), layer(x), rtol=1e-4, atol=1e-5)
    groups = layer.feature_group_count
    assert new.rank == report.rows[0].rank == min(4 // groups, np.prod(layer.kernel_size))
    assert report.rows[0].energy == pytest.approx(1)
    for name in ("use_bias", "feature_group_count", "dtype", "precision", "preferred_element_type"):
        assert getattr(new, name) == getattr(layer, name)


def test_energy_is_what_the_approximation_holds():
    layer = conv(5, 3, (3, 3))
    kernel = np.asarray(layer.kernel[...], np.float64)
    for rank in (1, 2, 5):
        new, report = replace_convs(layer, rank=rank)
        held = energy_of(np.asarray(new.composed_kernel()), kernel)
        assert report.rows[0].energy == pytest.approx(held, abs=1e-5)


def test_what_belongs_to_the_parameters_stays():
    class Frozen(nnx.Param):
        pass

    mesh = jax.make_mesh((1, 1), ("in", "out"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    layer = conv(
        kind=SubKernelConv,
        kernel_metadata={"out_sharding": (None, None, "in", "out"), "mesh": mesh, "mine": 1},
        bias_metadata={"out_sharding": ("out",), "mesh": mesh},
        param_dtype=jnp.bfloat16,
        promote_dtype=(promote := lambda arrays, dtype: arrays),
        lowering="lax",
    )
    layer.kernel = Frozen(layer.kernel[...], **layer.kernel.get_metadata())
    new, _ = replace_convs(layer, rank=2)
    assert new.pointwise.out_sharding == ("in", "out") and new.bias.out_sharding == ("out",)
    assert new.depthwise.out_sharding == (None, None, None, "out")
    assert new.pointwise.mine == new.depthwise.mine == 1
    assert type(new.pointwise) is type(new.depthwise) is Frozen
    assert new.pointwise.dtype == new.param_dtype == jnp.bfloat16
    assert new.promote_dtype is promote and new.lowering == "composed"
    np.testing.assert_array_equal(new.bias[...], layer.bias[...])


def test_initialised_anew():
    layer = conv(kind=SubKernelConv, bias_init=nnx.initializers.ones)
    new, report = replace_convs(layer, rank=2, from_weights=False, rngs=nnx.Rngs(7))
    same = ChannelSelectionConv(4, 6, (3, 3), rank=2, rngs=nnx.Rngs(7))
    np.testing.assert_array_equal(new.pointwise[...], same.pointwise[...])
    np.testing.assert_array_equal(new.depthwise[...], same.depthwise[...])
    assert report.rows[0].energy is None and (new.bias[...] == 1).all()
    with pytest.raises(ValueError, match="rngs=None must be given with from_weights=False"):
        replace_convs(layer, from_weights=False)


def test_another_layer_takes_the_place():
    layer = conv(8, 6, kind=SubKernelConv, bias_init=nnx.initializers.ones, lowering="lax")
    given = {"share": 0.75, "depthwise_init": nnx.initializers.ones, "norm": True}
    anew = {"rank": 9, "from_weights": False, "rngs": nnx.Rngs(7)}
    subspace = functools.partial(SubspaceChannelSelectionConv, **given)
    new, report = replace_convs(layer, conv=subspace, **anew)
    same = SubspaceChannelSelectionConv(8, 6, (3, 3), rank=6, **given, rngs=nnx.Rngs(7))
    for name in ("subspace", "pointwise", "depthwise"):
        np.testing.assert_array_equal(getattr(new, name)[...], getattr(same, name)[...])
    (row,) = report.rows
    # 6 of 8 channels are the subspace, from which each of 6 outputs has 6 sums.
    assert row.parameters_after == 8 * 6 + 6 * 36 + 9 * 36 + 6 + 2 * (6 + 36)
    assert (row.rank, row.energy, new.lowering) == (6, None, "grouped")
    assert (new.bias[...] == 1).all() and new.use_bias
    shifted = functools.partial(ChannelSelectionConv, norm=False, lowering="shifted")
    new, report = replace_convs(layer, rank=8, conv=shifted)
    assert new.lowering == "shifted" and report.rows[0].energy == pytest.approx(1)
    np.testing.assert_allclose(new.composed_kernel(), layer.kernel[...], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "given", "from_weights", "message"),
    [
        (nnx.Conv, {}, True, "conv=.*Conv.* must be ChannelSelectionConv, Subspace"),
        (lambda *_, **__: None, {}, False, "conv=<function .* must be ChannelSelectionConv"),
        (ChannelSelectionConv, {"strides": 2, "rank": 3}, False, "conv brings rank, strides; what"),
        (ChannelSelectionConv, {"share": 0.5}, False, "conv brings share; what it may bring is"),
        (ChannelSelectionConv, {"norm": True}, True, "conv brings norm, which .*from_weights=Fal"),
        (SubspaceChannelSelectionConv, {}, True, "conv=SubspaceChannelSelectionConv can only be"),
        (SubspaceChannelSelectionConv, {"share": 2}, False, r"share=2 must be in \(0, 1\]"),
        (SubspaceChannelSelectionConv, {"share": "a"}, False, r"share='a' must be in \(0, 1\]"),
    ],
)
def test_what_cannot_take_the_place(kind, given, from_weights, message):
    other = functools.partial(kind, **given) if given else kind
    with pytest.raises(ValueError, match=message):
        replace_convs(conv(), conv=other, from_weights=from_weights, rngs=nnx.Rngs(0))


# Networks


class OwnCall(nnx.Conv):
    def __call__(self, inputs):
        return super().__call__(2 * inputs)


class Renamed(nnx.Conv):
    pass


class Network(nnx.Module):
    """Layers in everything that holds layers; `first` is in four places."""

    def __init__(self):
        self.first = conv(4, 4)
        self.pair = nnx.data((self.first, conv(4, 4, seed=1)))
        self.named = nnx.data({"b": conv(4, 4, seed=2), "c": [self.first]})
        self.list = nnx.List([conv(4, 4, (1, 1)), conv(4, 4, kind=Renamed, seed=3)])
        self.dict = nnx.Dict(own=conv(4, 4, kind=OwnCall), deep=nnx.Dict(conv=conv(4, 4, seed=4)))
        self.body = nnx.Sequential(self.first, nnx.relu, conv(4, 4, feature_group_count=4))
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        self.static = ({"a": 1}, "text", None)

    def __call__(self, x):
        for layer in (*self.pair, self.named["b"], *self.list, self.dict.deep.conv):
            x = layer(x)
        return self.dropout(self.norm(self.body(self.dict.own(x))))


class WithParent(nnx.Module, pytree=False):
    """Flax takes plain containers and cycles in such modules."""

    def __init__(self):
        self.convs = [conv(4, 4), (conv(4, 4, seed=1),)]
        self.parent = self


REPLACED = {"body.layers.0", "dict.deep.conv", "list.1", "named.b", "pair.1"}


def test_every_place_of_a_layer():
    network = Network()
    network.norm.eval()
    before = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    new, report = replace_convs(network, rank=9)
    assert {row.path for row in report.rows} == REPLACED
    assert type(new.first) is ChannelSelectionConv
    assert new.first is new.pair[0] is new.named["c"][0] is new.body.layers[0]
    kept = (new.list[0], new.dict.own, new.body.layers[2])
    assert [type(layer) for layer in kept] == [nnx.Conv, OwnCall, nnx.Conv]
    assert new.norm.use_running_average and not new.dropout.deterministic
    x = jax.device_put(np.random.default_rng(0).standard_normal((2, 5, 5, 4)).astype(jnp.float32))
    for each in (network, new):
        each.eval()
    np.testing.assert_allclose(new(x), network(x), rtol=1e-3, atol=1e-4)
    assert type(network.pair[1]) is nnx.Conv
    after = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    # It can be taken apart, as by what trains and saves it.
    assert parameter_count(nnx.merge(*nnx.split(new))) == report.parameters_after


def test_plain_containers_and_cycles():
    new, report = replace_convs(WithParent())
    assert [row.path for row in report.rows] == ["convs.0", "convs.1.0"]
    assert type(new.convs[0]) is type(new.convs[1][0]) is ChannelSelectionConv
    assert new.parent is new


def test_choice_by_path_and_by_rank():
    network = Network()
    new, report = replace_convs(network, where=lambda path, layer: layer is network.pair[1])
    assert [row.path for row in report.rows] == ["pair.1"] and type(new.first) is nnx.Conv
    new, report = replace_convs(network, rank={"named.b": 3, "list.1": 100})
    assert {row.path: row.rank for row in report.rows} == {"named.b": 3, "list.1": 4}
    _, report = replace_convs(network, where=lambda path, layer: False)
    assert report.rows == () and report.parameters_after == report.parameters_before


def test_report_is_a_table():
    _, report = replace_convs(nnx.Sequential(conv(40, 50), conv(50, 4, (1, 1)), conv(50, 7)))
    heading, *rows, these, everything = str(report).splitlines()
    assert heading.split() == ["layer", "dense", "channel", "selection", "rank", "energy", "kept"]
    # 40 · 50 · 9 + 50 and 40 · 50 + 9 · 50 + 50 parameters; 50 · 7 · 9 + 7 and 50 · 7 + 9 · 7 + 7.
    assert rows[0].split()[:4] == ["layers.0", "18,050", "2,500", "1"]
    assert rows[1].split()[:4] == ["layers.2", "3,157", "420", "1"]
    assert rows[0].split()[4] == f"{report.rows[0].energy:.1%}"
    assert these.split() == ["these", "layers", "21,207", "2,920"]
    assert everything.split() == ["all", "parameters", "21,411", "3,124"]


# What cannot be replaced


def stacked():
    @nnx.vmap
    def make(rngs):
        return nnx.Conv(4, 4, (3, 3), rngs=rngs)

    return make(nnx.Rngs(0).split(3))


def tied():
    layers = conv(4, 4), conv(4, 4)
    layers[1].kernel = layers[0].kernel
    return nnx.List(layers)


def tied_to_another_kind():
    layers = conv(4, 4), nnx.ConvTranspose(4, 4, (3, 3), rngs=nnx.Rngs(0))
    layers[1].kernel = layers[0].kernel
    return nnx.List(layers)


def of_integers():
    layer = conv(4, 4)
    layer.kernel = nnx.Param(jnp.ones((3, 3, 4, 4), jnp.int8))
    return layer


def not_finite():
    layer = conv(4, 4)
    layer.kernel[0, 0, 0, 0] = jnp.nan
    return layer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: conv(mask=jnp.ones((3, 3, 4, 6))), "inner.0 has a mask"),
        (
            lambda: conv(conv_general_dilated=functools.partial(lax.conv_general_dilated)),
            "inner.0 has a conv_general_dilated of its own",
        ),
        (stacked, r"inner.0 is stacked, .* shape \(3, 3, 3, 4, 4\) has more than the 4 axes"),
        (tied, "inner.0.0 shares its kernel with inner.0.1"),
        (tied_to_another_kind, "inner.0.0 shares its kernel with inner.0.1"),
        (of_integers, "inner.0: its kernel is of int8, factors are real numbers"),
        (lambda: conv(4, 4, param_dtype=jnp.complex64), "its kernel is of complex64, factors"),
        (
            lambda: nnx.WeightNorm(conv(4, 4), rngs=nnx.Rngs(0)),
            "inner.0.layer_instance has a kernel that nnx.WeightNorm changes",
        ),
        (not_finite, r"inner.0: a kernel of shape \(3, 3, 4, 4\) holds values that are not finite"),
        (lambda: conv(input_dilation=2), "inner.0: padding='SAME' must be in integers"),
        (lambda: nnx.eval_shape(conv), "inner.0: its kernel has a shape and no values"),
    ],
)
def test_refused_by_path_unless_it_is_left_out(make, message):
    network = nnx.Dict(inner=nnx.List([make()]), other=conv())
    with pytest.raises(ValueError, match=message) as found:
        replace_convs(network)
    assert "\n" not in str(found.value)
    _, report = replace_convs(network, where=lambda path, layer: path == "other")
    assert [row.path for row in report.rows] == ["other"]


def test_what_is_no_module_or_has_no_values_is_told():
    with pytest.raises(ValueError, match="module of type ArrayImpl must be an nnx.Module"):
        replace_convs(jnp.ones(3))
    graph, state = nnx.split(conv(4, 4))
    with pytest.raises(ValueError, match=r"module: its kernel has no values while JAX traces"):
        jax.jit(lambda state: replace_convs(nnx.merge(graph, state)))(state)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "rank=0 must be an integer of at least 1"),
        ({"1": 1.5}, r"rank\['1'\]=1.5 must be an integer of at least 1"),
        ({"0": 1}, r"rank\['0'\] is of no layer that is replaced; these are: '1'"),
    ],
)
def test_wrong_ranks(rank, message):
    with pytest.raises(ValueError, match=message):
        replace_convs(nnx.List([conv(size=(1, 1)), conv()]), rank=rank)


# The package bsconv, whose replacer works on PyTorch


def by_its_rule(path, layer):
    return layer.kernel_size in ((3, 3), (5, 5)) and layer.feature_group_count == 1


@pytest.mark.parametrize("stem", ["plain", "pooled"])
def test_counts_are_those_of_its_replacer(stem):
    config = ResNetConfig(SubKernelConv, 10, (1, 2), 8, stem, use_bias=stem == "pooled")

    def replaced():
        network, rngs = ResNet(config, rngs=nnx.Rngs(0)), nnx.Rngs(0)
        return replace_convs(network, where=by_its_rule, from_weights=False, rngs=rngs)[0]

    network = nnx.eval_shape(replaced)
    theirs = bsconv.pytorch.BSConvU_Replacer().apply(torch_twin("subkernel", config))
    assert parameter_count(network) == sum(p.numel() for p in theirs.parameters())
    assert type(network.stem.conv) is (ChannelSelectionConv if stem == "plain" else SubKernelConv)


def twins(*layers):
    """Convolutions of PyTorch one after the other, and the same of Flax."""
    ours = nnx.Sequential(
        *(
            conv(
                each.in_channels,
                each.out_channels,
                each.kernel_size,
                strides=each.stride,
                feature_group_count=each.groups,
                use_bias=each.bias is not None,
            )
            for each in layers
        )
    )
    return torch.nn.Sequential(*layers), ours


@pytest.mark.parametrize(
    ("layers", "replaced"),
    [
        (
            [
                torch.nn.Conv2d(6, 8, 5),
                torch.nn.Conv2d(8, 8, 3, groups=2),
                torch.nn.Conv2d(8, 4, (3, 5), bias=False),
                torch.nn.Conv2d(4, 4, 3, groups=4),
                torch.nn.Conv2d(4, 9, 3, bias=False),
            ],
            ["layers.0", "layers.4"],
        ),
        (
            [
                torch.nn.Conv2d(1, 8, 3),
                torch.nn.Conv2d(8, 16, 5, stride=2),
                torch.nn.Conv2d(16, 16, 3, groups=4),
                torch.nn.Conv2d(16, 16, (3, 5)),
            ],
            ["layers.0", "layers.1"],
        ),
    ],
)
def test_counts_of_other_kernels_and_groups(layers, replaced):
    theirs, ours = twins(*layers)
    _, report = replace_convs(ours, where=by_its_rule)
    theirs = bsconv.pytorch.BSConvU_Replacer().apply(theirs)
    assert report.parameters_after == sum(p.numel() for p in theirs.parameters())
    assert [row.path for row in report.rows] == replaced


@pytest.mark.parametrize("size", [(3,), (3, 3), (2, 2, 2)])
def test_one_input_channel_is_replaced_exactly(size):
    layer = conv(1, 5, size)
    new, report = replace_convs(layer, rank=4)
    np.testing.assert_allclose(new.composed_kernel(), layer.kernel[...], rtol=1e-5, atol=1e-6)
    (row,) = report.rows
    # The bias, a weight and a kernel for each output.
    assert row.rank == 1 and row.energy == pytest.approx(1)
    assert row.parameters_after == 5 + 5 + 5 * np.prod(size)


@pytest.mark.parametrize(
    ("conv", "replacer"),
    [
        (
            functools.partial(ChannelSelectionConv, norm=True),
            bsconv.pytorch.BSConvU_Replacer(with_bn=True),
        ),
        (SubspaceChannelSelectionConv, bsconv.pytorch.BSConvS_Replacer()),
        (
            functools.partial(SubspaceChannelSelectionConv, share=0.5, norm=True),
            bsconv.pytorch.BSConvS_Replacer(p=0.5, with_bn=True),
        ),
    ],
)
def test_counts_with_norm_and_from_a_subspace(conv, replacer):
    layers = torch.nn.Conv2d(1, 20, 5), torch.nn.Conv2d(20, 30, 3, bias=False)
    theirs, ours = twins(*layers, torch.nn.Conv2d(30, 6, 3, groups=6))
    anew = {"from_weights": False, "rngs": nnx.Rngs(0)}
    new, report = replace_convs(ours, conv=conv, where=by_its_rule, **anew)
    theirs = replacer.apply(theirs)
    assert report.parameters_after == sum(p.numel() for p in theirs.parameters())
    for row, layer, twin in zip(report.rows, new.layers, theirs, strict=False):
        assert row.parameters_after == sum(p.numel() for p in twin.parameters())
        assert (layer.norm is None) == ("norm" not in getattr(conv, "keywords", {}))
    assert type(new.layers[2]) is nnx.Conv
