"""The layers in the place of `nnx.Conv`: its arguments, its results, its parameters."""

import inspect
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from layers import assert_close

from chansel_jax import ChannelSelectionConv, SubKernelConv, conv
from chansel_jax.conv import lowerings_taken, window_of
from chansel_jax.ops.limits import Options, lacks
from chansel_jax.ops.lowerings import runnable
from chansel_jax.ops.selection import composed_kernel

LAYERS = [SubKernelConv, ChannelSelectionConv]


def normal(*shape, dtype=jnp.float32):
    return jax.device_put(np.random.default_rng(0).standard_normal(shape).astype(dtype))


def flax_twin(layer, *sizes, **options):
    """`nnx.Conv` with the kernel that `layer` computes with, and its bias."""
    twin = nnx.Conv(*sizes, **options, rngs=nnx.Rngs(1))
    dense = isinstance(layer, SubKernelConv)
    twin.kernel[...] = layer.kernel[...] if dense else layer.composed_kernel()
    if layer.bias is not None:
        twin.bias[...] = layer.bias[...]
    return twin


@pytest.mark.parametrize("layer_type", LAYERS)
def test_arguments_are_those_of_flax(layer_type):
    theirs = inspect.signature(nnx.Conv.__init__).parameters
    ours = inspect.signature(layer_type.__init__).parameters
    for name, argument in theirs.items():
        assert name in ours, f"{name} of nnx.Conv is missing"
        assert ours[name].kind == argument.kind, name
        if not name.endswith(("_init", "_metadata")):  # functions and mappings that are made anew
            assert ours[name].default == argument.default, name
        elif name.endswith("_metadata"):
            assert dict(ours[name].default) == dict(argument.default), name
    assert list(ours)[: len(theirs)] == list(theirs)
    own = list(ours.values())[len(theirs) :]
    assert all(argument.kind is inspect.Parameter.KEYWORD_ONLY for argument in own)
    called = [inspect.signature(kind.__call__).parameters for kind in (layer_type, nnx.Conv)]
    assert [(p.name, p.default) for p in called[0].values()] == [
        (p.name, p.default) for p in called[1].values()
    ]


@pytest.mark.parametrize("options", [{}, {"use_bias": False}, {"feature_group_count": 2}])
@pytest.mark.parametrize("kernel_size", [3, (2, 3), (1, 2, 3)])
def test_parameters_of_a_seed_are_those_of_flax(kernel_size, options):
    made = [
        kind(4, 6, kernel_size, **options, rngs=nnx.Rngs(5)) for kind in (SubKernelConv, nnx.Conv)
    ]
    ours, theirs = (nnx.to_pure_dict(nnx.state(layer)) for layer in made)
    assert ours.keys() == theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array)


@st.composite
def calls(draw):
    """Arguments of `nnx.Conv` that fit each other, and the shape of an input."""
    dimensions = draw(st.integers(1, 3))

    def each(low, high, *others):
        """An integer for all axes, one for each, or one of `others`."""
        number = st.integers(low, high)
        return draw(st.one_of(number, st.tuples(*[number] * dimensions), *map(st.just, others)))

    groups = draw(st.sampled_from((1, 1, 2)))
    numbers = st.integers(-1, 2)
    named = ["SAME", "same", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT"]
    named += ["CAUSAL"] if dimensions == 1 else []
    pairs = st.tuples(*[st.tuples(numbers, numbers)] * dimensions)
    padding = draw(
        st.one_of(st.sampled_from(named), numbers, st.tuples(*[numbers] * dimensions), pairs)
    )
    batch = draw(st.sampled_from(((2,), (2,), (), (2, 1))))
    size = draw(st.tuples(*[st.integers(7, 9)] * dimensions))
    kernel_size = draw(st.tuples(*[st.integers(1, 3)] * dimensions))
    sizes = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3)), kernel_size
    options = {
        "strides": each(1, 3, None),
        "padding": padding,
        "input_dilation": 1 if isinstance(padding, str) else each(1, 2, None),
        "kernel_dilation": each(1, 2, None),
        "feature_group_count": groups,
        "use_bias": draw(st.booleans()),
        "dtype": draw(st.sampled_from((None, None, jnp.float16))),
        "preferred_element_type": draw(st.sampled_from((None, None, jnp.float32))),
    }
    return sizes, options, (*batch, *size, sizes[0])


def gradients_of_parts(layer, kernel_gradient):
    """The gradients of both parts that the composed kernel's brings."""
    return jax.vjp(composed_kernel, layer.pointwise[...], layer.depthwise[...])[1](kernel_gradient)


@pytest.mark.parametrize("layer_type", [nnx.Conv, *LAYERS])
def test_attributes_may_be_set_after_construction(layer_type):
    options = {"strides": 2, "padding": 1, "kernel_dilation": 2}
    made_so, changed = (layer_type(2, 3, (3, 3), **o, rngs=nnx.Rngs(0)) for o in (options, {}))
    for name, value in options.items():
        setattr(changed, name, value)
    x = normal(1, 9, 8, 2)
    np.testing.assert_array_equal(changed(x), made_so(x))


def drawn(key, shape, dtype):
    """An initialiser in NumPy, which compiles nothing."""
    return jax.device_put(np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype))


@hypothesis.settings(max_examples=20, derandomize=True, deadline=None, database=None)
@hypothesis.given(call=calls(), data=st.data())
@pytest.mark.parametrize("layer_type", LAYERS)
def test_outputs_and_gradients_are_those_of_flax(layer_type, call, data):
    sizes, options, shape = call
    init = {"kernel_init": drawn, "bias_init": drawn, "rngs": nnx.Rngs(0)}
    graph, state = nnx.split(layer_type(*sizes, **options, **init))
    window = window_of(nnx.merge(graph, state))
    groups, preferred = options["feature_group_count"], options["preferred_element_type"]
    asked = Options(groups=groups, preferred_element_type=preferred)
    lowerings = [name for name in runnable(layer_type.LOWERINGS) if not lacks(name, window, asked)]
    if options["dtype"] is not None:
        lowerings = [name for name in lowerings if "native" not in name]
    lowering = data.draw(st.sampled_from(lowerings))

    def ours(state, x):
        layer = nnx.merge(graph, state)
        layer.lowering = lowering
        return layer(x)

    def theirs(state, x):
        layer = nnx.merge(graph, state)
        dense = layer_type is SubKernelConv
        kernel = layer.kernel[...] if dense else layer.composed_kernel()
        init = {"kernel_init": lambda *_: kernel, "bias_init": lambda *_: layer.bias[...]}
        return nnx.Conv(*sizes, **options, **init, rngs=nnx.Rngs(0))(x)

    @jax.jit
    def outputs_and_gradients(state, x):
        results = []
        for function in (ours, theirs):
            y, pull_back = jax.vjp(function, state, x)
            cotangent = jnp.asarray(np.cos(np.arange(y.size)).reshape(y.shape), y.dtype)
            results.append((y, pull_back(cotangent)))
        return results

    actual, expected = outputs_and_gradients(state, drawn(None, shape, jnp.float32))
    assert actual[0].dtype == expected[0].dtype
    assert_close(actual, expected, 2e-2 if options["dtype"] else 1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 3])
@pytest.mark.parametrize("layer_type", LAYERS)
def test_one_and_three_dimensions_are_those_of_torch(layer_type, dimensions, groups):
    kernel_size, strides, dilation = (3, 2, 1)[:dimensions], (2, 1, 3)[:dimensions], 2
    layer = layer_type(
        *(4, 6, kernel_size, strides),
        padding=1,
        kernel_dilation=dilation,
        feature_group_count=groups,
        rngs=nnx.Rngs(0),
    )
    kind = {1: torch.nn.Conv1d, 3: torch.nn.Conv3d}[dimensions]
    twin = kind(4, 6, kernel_size, strides, 1, dilation, groups)
    dense = layer_type is SubKernelConv
    kernel = np.array(layer.kernel[...] if dense else layer.composed_kernel())
    axes = (dimensions + 1, dimensions, *range(dimensions))
    with torch.no_grad():
        twin.weight.copy_(torch.from_numpy(kernel.transpose(axes)))
        twin.bias.zero_()
    x = normal(2, *(9, 8, 7)[:dimensions], 4)
    first = torch.from_numpy(np.moveaxis(np.array(x), -1, 1).copy()).requires_grad_()
    expected = twin(first)
    expected.cos().sum().backward()
    graph, state = nnx.split(layer)

    @jax.jit
    def of_layer(state, x):
        y = nnx.merge(graph, state)(x)
        return jnp.sum(jnp.cos(y)), y

    (gradients, x_gradient), y = jax.grad(of_layer, (0, 1), has_aux=True)(state, x)
    assert_close(y, np.moveaxis(expected.detach().numpy(), 1, -1), 1e-5)
    assert_close(x_gradient, np.moveaxis(first.grad.numpy(), 1, -1), 1e-5)
    of_kernel = jnp.asarray(twin.weight.grad.numpy().transpose(np.argsort(axes)))
    if dense:
        assert_close(gradients["kernel"][...], of_kernel, 1e-5)
    else:
        parts = gradients["pointwise"][...], gradients["depthwise"][...]
        assert_close(parts, gradients_of_parts(layer, of_kernel), 1e-5)


@pytest.mark.parametrize("layer_type", LAYERS)
def test_an_integer_is_a_one_dimensional_kernel(layer_type):
    layer = layer_type(4, 6, 3, rngs=nnx.Rngs(0))
    assert layer(normal(5, 4)).shape == (5, 6)
    assert layer(normal(2, 5, 4)).shape == (2, 5, 6)
    message = "kernel_size=3 is one-dimensional, as in nnx.Conv; write kernel_size=(3, 3)"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(normal(2, 5, 5, 4))
    assert layer_type(4, 6, (3,), rngs=nnx.Rngs(0))(normal(2, 3, 5, 4)).shape == (2, 3, 5, 6)
    with pytest.raises(ValueError, match=re.escape("must be (*batch, D, H, W, C_in)")):
        layer_type(4, 6, (3, 3, 3), rngs=nnx.Rngs(0))(normal(5, 5, 4))


@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize("parameters", [jnp.float16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("inputs", [jnp.float16, jnp.bfloat16, jnp.int8])
def test_the_arrays_decide_the_dtype(layer_type, inputs, parameters):
    layer = layer_type(2, 3, (2, 2), rngs=nnx.Rngs(0))
    state = jax.tree.map(lambda leaf: leaf.astype(parameters), nnx.state(layer))
    nnx.update(layer, state)
    twin = flax_twin(layer, 2, 3, (2, 2))
    nnx.update(twin, jax.tree.map(lambda leaf: leaf.astype(parameters), nnx.state(twin)))
    x = jnp.arange(2 * 3 * 3 * 2).reshape(2, 3, 3, 2).astype(inputs)
    expected = twin(x)
    assert layer(x).dtype == expected.dtype
    assert_close(layer(x), expected, 3e-2)


@pytest.mark.parametrize("layer_type", LAYERS)
def test_float64(layer_type):
    with jax.enable_x64(True):
        layer = layer_type(2, 3, (2, 2), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        x = normal(1, 4, 4, 2, dtype=jnp.float64)
        y = layer(x)
        assert y.dtype == jnp.float64
        assert_close(y, flax_twin(layer, 2, 3, (2, 2), param_dtype=jnp.float64)(x), 1e-12)


@pytest.mark.parametrize("layer_type", LAYERS)
def test_a_promotion_of_the_user_s(layer_type):
    def doubled(arrays, *, dtype):
        assert dtype == jnp.bfloat16
        return tuple(None if a is None else 2 * jnp.asarray(a, dtype) for a in arrays)

    options = {"dtype": jnp.bfloat16, "use_bias": False, "rngs": nnx.Rngs(0)}
    layer = layer_type(2, 3, (2, 2), **options, promote_dtype=doubled)
    plain = layer_type(2, 3, (2, 2), **options)
    nnx.update(plain, nnx.state(layer))
    x = normal(1, 4, 4, 2)
    factor = 2 ** (2 if layer_type is SubKernelConv else 3)  # of the input and each kernel
    assert layer(x).dtype == jnp.bfloat16
    assert_close(layer(x), factor * plain(x), 2e-2)


def test_a_mask_and_a_function_that_convolves():
    sizes, mask, x = (4, 6, (3, 3), 2), jnp.tril(jnp.ones((3, 3, 4, 6))), normal(1, 5, 5, 4)
    calls = []

    def convolve(*operands, **options):
        calls.append(options["dimension_numbers"])
        assert "preferred_element_type" not in options
        return jax.lax.conv_general_dilated(*operands, **options)

    for options in ({"mask": mask}, {"conv_general_dilated": convolve, "padding": "CIRCULAR"}):
        layer = SubKernelConv(*sizes, **options, rngs=nnx.Rngs(0))
        assert lowerings_taken(layer, x.dtype) == {SubKernelConv: ["lax"]}
        np.testing.assert_array_equal(layer(x), flax_twin(layer, *sizes, **options)(x))
        (name,) = {"mask", "conv_general_dilated"} & options.keys()
        with pytest.raises(ValueError, match=name):
            ChannelSelectionConv(*sizes, **options, rngs=nnx.Rngs(0))
    assert len(calls) == 2 and calls[0] == calls[1]
    with pytest.raises(ValueError, match=re.escape("mask of shape (3, 3)")):
        SubKernelConv(*sizes, mask=mask[..., 0, 0], rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="mask of type list must be an array of the kernel's"):
        SubKernelConv(*sizes, mask=[[1.0]], rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("sizes", "options", "missing"),
    [
        ((4, 6, (3, 3, 3)), {}, "3 spatial axes"),
        ((4, 6, (3, 3)), {"padding": 1, "input_dilation": 2}, "input_dilation=(2, 2)"),
        ((4, 6, (3, 3)), {"padding": (-1, 0)}, "negative padding"),
        ((4, 6, (3, 3)), {"preferred_element_type": jnp.float32}, "preferred_element_type"),
    ],
)
def test_what_a_lowering_lacks_is_named_and_auto_has_it(sizes, options, missing):
    layer = ChannelSelectionConv(*sizes, **options, rngs=nnx.Rngs(0))
    assert lowerings_taken(layer, jnp.float32) == {ChannelSelectionConv: ["composed"]}
    with pytest.raises(ValueError, match=f"lowering='shifted'.*{re.escape(missing)}"):
        ChannelSelectionConv(*sizes, **options, lowering="shifted", rngs=nnx.Rngs(0))
    layer = SubKernelConv(*sizes, **options, rngs=nnx.Rngs(0))
    assert lowerings_taken(layer, jnp.float32) == {SubKernelConv: ["lax"]}


@pytest.mark.parametrize("layer_type", LAYERS)
def test_the_output_s_sharding(layer_type):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    layer, x = layer_type(4, 6, (3, 3), rngs=nnx.Rngs(0)), normal(4, 5, 5, 4)
    expected = layer(x)
    with jax.set_mesh(mesh):
        images = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        y = layer(images, out_sharding=PartitionSpec("data"))
    assert y.sharding.spec[0] == "data"
    assert_close(y, expected, 1e-5)
    wrong = "native" if layer_type is SubKernelConv else "shifted"
    if wrong in runnable(layer_type.LOWERINGS):
        layer.lowering = wrong
        with pytest.raises(ValueError, match=f"lowering='{wrong}'.*out_sharding"):
            layer(x, out_sharding=PartitionSpec("data"))


def test_names_of_the_composed_kernel_s_axes_are_those_of_its_parts():
    names = ("rows", None, "in", "out")
    lecun = nnx.initializers.lecun_normal()
    with nnx.use_eager_sharding(False):
        for options in (
            {"kernel_init": nnx.with_partitioning(lecun, names)},
            {"kernel_metadata": {"out_sharding": names}},
        ):
            dense = SubKernelConv(4, 6, (3, 3), **options, rngs=nnx.Rngs(0))
            layer = ChannelSelectionConv(4, 6, (3, 3), **options, rngs=nnx.Rngs(0))
            assert dense.kernel.out_sharding == names
            assert layer.pointwise.out_sharding == ("in", "out")
            assert layer.depthwise.out_sharding == ("rows", None, None, "out")
            layer = ChannelSelectionConv(
                *(4, 6, (3, 3)),
                **options,
                pointwise_metadata={"out_sharding": (None, "other")},
                depthwise_init=nnx.with_partitioning(lecun, (None, None, None, "own")),
                bias_metadata={"out_sharding": ("out",)},
                rngs=nnx.Rngs(0),
            )
            assert layer.pointwise.out_sharding == (None, "other")
            assert layer.depthwise.out_sharding == (None, None, None, "own")
            assert layer.bias.out_sharding == ("out",)


def test_in_linen():
    layer = nnx.bridge.to_linen(ChannelSelectionConv, 4, 6, kernel_size=(3, 3))
    x = normal(1, 5, 5, 4)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    assert {name: v.shape for name, v in variables["params"].items()} == {
        "pointwise": (4, 6),
        "depthwise": (3, 3, 1, 6),
        "bias": (6,),
    }
    np.testing.assert_allclose(layer.apply(variables, x), y, rtol=1e-5)


def test_the_code_of_the_readme():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    (network,) = (block for block in blocks if "nnx.Module" in block)
    for block in (*blocks, network.replace("ChannelSelectionConv(", "nnx.Conv(")):
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("key", ["out_sharding", "sharding", "sharding_names"])
@pytest.mark.parametrize(
    ("names", "pointwise", "depthwise"),
    [
        ((None, None, "in", "out"), ("in", "out"), (None, None, None, "out")),
        (("rows",), (None, None), ("rows", None, None, None)),
        ((), (None, None), (None,) * 4),
    ],
)
def test_names_of_a_kernels_axes_are_those_of_its_parts(key, names, pointwise, depthwise):
    for axes, expected in ((slice(-2, None), pointwise), (None, depthwise)):
        of_part = (lambda n, a=axes: n[a]) if axes else (lambda n: (*n[:-2], None, n[-1]))
        assert conv._sharded_as({key: names, "x": 1}, of_part, 4) == {key: expected, "x": 1}


@pytest.mark.parametrize("kind", [SubKernelConv, ChannelSelectionConv])
def test_sizes_in_arrays_and_precision_in_a_list(kind):
    sizes = {"strides": np.array([2, 1]), "padding": np.array([[1, 1], [0, 2]])}
    layer = kind(2, 3, np.array([3, 3]), **sizes, precision=["high", "high"], rngs=nnx.Rngs(0))
    same = kind(2, 3, (3, 3), (2, 1), padding=((1, 1), (0, 2)), rngs=nnx.Rngs(0))
    x = jnp.ones((1, 6, 5, 2))
    np.testing.assert_allclose(layer(x), same(x), rtol=1e-5)
