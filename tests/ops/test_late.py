"""Functions whose lowering is chosen late: derivatives, transformations, meshes and exports.

The oracle is the lowering "composed", which is a convolution of `jax.lax` alone.
"""

import collections
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import environment, free_port
from flax import nnx
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from layers import assert_close, normal

import chansel_jax
from chansel_jax import ChannelSelectionConv, SubKernelConv
from chansel_jax.networks.resnet import resnet14
from chansel_jax.ops.dense import dense_conv
from chansel_jax.ops.lowerings import NATIVE, runnable
from chansel_jax.ops.selection import LOWERINGS, channel_selection

# Images, pointwise, depthwise and dense kernel.
SHAPES = ((2, 5, 4, 2), (2, 6), (3, 3, 2, 3), (3, 3, 2, 3))
WINDOW = {"strides": 2, "padding": 1}


@pytest.fixture
def operands():
    with jax.enable_x64(True):
        yield normal(*SHAPES, dtype=jnp.float64)


def loss(x, pointwise, depthwise, kernel, *, late):
    """A scalar of both convolutions, by what is chosen late or by `jax.lax`."""
    selected = channel_selection(
        x, pointwise, depthwise, **WINDOW, lowering="auto" if late else "composed"
    )
    dense = dense_conv(x, kernel, **WINDOW, lowering="auto" if late else "lax")
    return jnp.sum(jnp.sin(selected) * jnp.cos(dense))


def slope(*operands, late):
    """A scalar of all first derivatives."""
    gradients = jax.grad(functools.partial(loss, late=late), (0, 1, 2, 3))(*operands)
    return sum(jnp.sum(jnp.sin(gradient)) for gradient in gradients)


def jvp(function):
    return lambda *primals: jax.jvp(function, primals, tuple(0.5 * p + 1 for p in primals))


EVERY = (0, 1, 2, 3)
DERIVATIVES = {
    "grad": lambda f: jax.grad(f, EVERY),
    "by one operand": lambda f: jax.grad(f, 1),
    "jvp": jvp,
    "jacfwd": lambda f: jax.jacfwd(f, EVERY),
    "jacrev": lambda f: jax.jacrev(lambda *a: jnp.stack([f(*a), 2 * f(*a)]), EVERY),
    "hessian": lambda f: jax.hessian(f, (1, 2)),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f), EVERY),
    "linearize": lambda f: lambda *a: jax.linearize(f, *a)[1](*a),
    "jvp of jvp": lambda f: jvp(jvp(f)),
    "jvp of grad": lambda f: jvp(jax.grad(f, EVERY)),
}


@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives_are_those_of_lax(operands, derivative):
    late, by_lax = (derivative(functools.partial(loss, late=late)) for late in (True, False))
    assert_close(leaves(jax.jit(late)(*operands)), leaves(jax.jit(by_lax)(*operands)), 1e-12)


def test_gradients_of_gradients_are_those_of_lax(operands):
    late, by_lax = (
        jax.jit(jax.grad(functools.partial(slope, late=late), EVERY)) for late in (True, False)
    )
    assert_close(late(*operands), by_lax(*operands), 1e-12)


@pytest.mark.parametrize("lowering", [n for n in runnable(LOWERINGS) if n in NATIVE])
def test_second_derivatives_of_what_is_asked_for_by_name(operands, lowering):
    x, pointwise, depthwise, _ = operands

    def selected(pointwise, depthwise, lowering):
        y = channel_selection(x, pointwise, depthwise, **WINDOW, lowering=lowering)
        return jnp.sum(jnp.sin(y))

    named, by_lax = (
        jax.jit(jax.hessian(functools.partial(selected, lowering=name), (0, 1)))
        for name in (lowering, "composed")
    )
    parts = pointwise, depthwise
    assert_close(leaves(named(*parts)), leaves(by_lax(*parts)), 1e-12)


def test_directional_derivative_is_the_finite_difference(operands):
    x, *kernels = operands
    f = functools.partial(loss, late=True)
    _, tangent = jvp(f)(x, *kernels)
    step = 1e-6
    there, back = (f(*(o + s * (0.5 * o + 1) for o in operands)) for s in (step, -step))
    np.testing.assert_allclose(tangent, (there - back) / (2 * step), rtol=1e-7)


def test_linear_transpose(operands):
    x, pointwise, depthwise, _ = operands
    f = functools.partial(channel_selection, pointwise=pointwise, depthwise=depthwise, **WINDOW)
    y, pull = jax.vjp(f, x)
    assert_close(jax.linear_transpose(f, x)(y), pull(y), 1e-12)


def leaves(tree):
    return jax.tree.leaves(tree)


@pytest.mark.parametrize(
    "axes", [(0, None, None, None), (None, 2, 0, 0), (0, 0, None, 0), (1, 0, 3, 4)], ids=str
)
@pytest.mark.parametrize("derivative", [lambda f: f, DERIVATIVES["grad"], DERIVATIVES["hessian"]])
def test_vmap(operands, axes, derivative):
    mapped = [
        o if axis is None else jnp.stack([o, o - 0.5, 2 * o], axis)
        for o, axis in zip(operands, axes, strict=True)
    ]

    def all_of(late):
        one = jax.vmap(derivative(functools.partial(loss, late=late)), axes)
        twice = jax.vmap(lambda scale, *o: one(scale * o[0], *o[1:]), (0, *[None] * 4))
        return jax.jit(lambda *o: (one(*o), twice(jnp.array([1.0, 3.0]), *o)))(*mapped)

    assert_close(leaves(all_of(True)), leaves(all_of(False)), 1e-11)


def test_jacobian_by_images_alone(operands):
    x, pointwise, depthwise, _ = operands
    how = {"pointwise": pointwise, "depthwise": depthwise, **WINDOW}
    for derivative in (jax.jacrev, jax.jacfwd):
        late, by_lax = (
            derivative(functools.partial(channel_selection, **how, lowering=lowering))(x)
            for lowering in ("auto", "composed")
        )
        assert_close(late, by_lax, 1e-12)


def test_images_of_a_vmap_join_the_batch(operands):
    x, pointwise, depthwise, _ = operands
    call = functools.partial(channel_selection, pointwise=pointwise, depthwise=depthwise)
    text = jax.jit(jax.vmap(call)).lower(jnp.stack([x] * 3)).as_text()
    assert "while" not in text


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("devices", [1, 2])
def test_meshes_of_automatic_and_explicit_axes(kind, devices):
    operands = normal(*SHAPES)
    expected = jax.value_and_grad(functools.partial(loss, late=False), EVERY)(*operands)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        divided = NamedSharding(mesh, PartitionSpec("data"))
        x = jax.device_put(operands[0], divided)
        kernels = jax.device_put(operands[1:], NamedSharding(mesh, PartitionSpec()))
        step = jax.jit(jax.value_and_grad(functools.partial(loss, late=True), EVERY))
        value, gradients = step(x, *kernels)
        compiled = step.lower(x, *kernels).compile().as_text()
    assert_close((value, *gradients), (expected[0], *expected[1]), 1e-5)
    assert gradients[0].sharding.is_equivalent_to(divided, 4)
    assert "all-gather" not in compiled and ("all-reduce" in compiled) == (devices > 1)
    # Every device takes what one alone would.
    assert compiled.count("custom-call") == compiled_for_one(operands).count("custom-call")


def compiled_for_one(operands):
    step = jax.jit(jax.value_and_grad(functools.partial(loss, late=True), EVERY))
    return step.lower(*operands).compile().as_text()


@pytest.fixture
def kept():
    """Counts the programs that were compiled before and the new ones."""
    events = collections.Counter()

    def listener(name, **_):
        events[name.rpartition("/")[2]] += 1

    jax.monitoring.register_event_listener(listener)
    yield events
    jax.monitoring.unregister_event_listener(listener)


def program(padding, derivative):
    """A function that JAX has not seen yet."""

    def output(x, pointwise, depthwise):
        return channel_selection(x, pointwise, depthwise, padding=padding)

    def scalar(*operands):
        return jnp.sum(jnp.sin(output(*operands)))

    return jax.jit(jax.grad(scalar, (0, 1, 2)) if derivative else output)


@pytest.mark.parametrize("derivative", [False, True])
def test_a_program_of_several_devices_is_known_again_by_what_it_computes(kept, derivative):
    """With both windows the output has one shape."""
    x, *kernels = normal((4, 6, 5, 3), (3, 7), (3, 3, 1, 7))
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
    for padding, axis in ((1, "data"), (((0, 2), (0, 2)), "data"), (1, None)):
        divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec(axis)))
        for counts in ((0, 1), (1, 0)):
            kept.clear()
            found = program(padding, derivative)(divided, *kernels)
            assert (kept["cache_hits"], kept["cache_misses"]) == counts
        expected = program(padding, derivative)(x, *kernels)
        assert_close(leaves(expected), leaves(found), 1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_eight_devices_of_one_process_and_of_two(count):
    script, port = Path(__file__).parents[1] / "over_devices.py", free_port()
    found = [
        subprocess.Popen(
            [sys.executable, script, str(port), str(count), str(process)],
            env=environment(8 // count),
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(count)
    ]
    try:
        for process in found:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in found:
            process.kill()


def test_a_batch_that_the_devices_cannot_share_equally():
    x, *kernels = normal((8, *SHAPES[0][1:]), *SHAPES[1:])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    divided = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    def of_seven(x, *kernels, late):
        return loss(jnp.sin(x)[:7], *kernels, late=late)

    late, by_lax = (
        jax.jit(jax.grad(functools.partial(of_seven, late=late), EVERY))(divided, *kernels)
        for late in (True, False)
    )
    assert_close(late, by_lax, 1e-5)


@pytest.mark.parametrize("lowering", ["auto", "shifted", "grouped"])
def test_gradients_within_shard_map(lowering):
    x, pointwise, depthwise, _ = normal(*SHAPES)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def total(pointwise, depthwise, x, lowering):
        y = channel_selection(x, pointwise, depthwise, lowering=lowering)
        return jnp.sum(jnp.sin(y))

    def of_part(x, *kernels):
        def of_all(*kernels):
            return jax.lax.psum(total(*kernels, x, lowering), "data")

        return jax.grad(of_all, (0, 1))(*kernels)

    specs = PartitionSpec("data"), PartitionSpec(), PartitionSpec()
    mapped = jax.shard_map(of_part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    expected = jax.grad(total, (0, 1))(pointwise, depthwise, x, "composed")
    assert_close(jax.jit(mapped)(x, pointwise, depthwise), expected, 1e-5)


def test_the_device_that_holds_an_array_computes():
    operands = jax.device_put(normal(*SHAPES), jax.devices()[1])
    value = jax.jit(functools.partial(loss, late=True))(*operands)
    assert value.devices() == {jax.devices()[1]}
    assert_close(value, loss(*operands, late=False), 1e-5)


RELOADED = """
import sys
sys.modules["chansel_jax"] = None  # as if it were not installed
import jax, numpy as np
from pathlib import Path
exported = jax.export.deserialize(bytearray(Path(sys.argv[1]).read_bytes()))
np.save(sys.argv[2], exported.call(np.load(sys.argv[3])))
"""


def test_exported_program_runs_where_the_package_is_not(tmp_path):
    network = resnet14(width=4, blocks=(1, 1), rngs=nnx.Rngs(0))
    network.eval()
    x = normal((2, 8, 9, 3))[0]
    graph, state = nnx.split(network)
    platforms = ("cpu", "cuda", "tpu")
    shape = export.symbolic_shape("n, h, w, 3", constraints=["h >= 8", "w >= 8"])
    any_images = jax.ShapeDtypeStruct(shape, jnp.float32)
    call = jax.jit(lambda x: nnx.merge(graph, state)(x))
    program = export.export(call, platforms=platforms)(any_images)
    assert program.platforms == platforms and "@chansel" not in program.mlir_module()
    paths = [str(tmp_path / name) for name in ("program", "y.npy", "x.npy")]
    (tmp_path / "program").write_bytes(program.serialize())
    np.save(paths[2], x)
    subprocess.run(
        [sys.executable, "-c", RELOADED, *paths], check=True, env=environment(1), timeout=120
    )
    assert_close(np.load(paths[1]), network(x), 1e-5)


def test_a_lowering_for_a_whole_network():
    network = nnx.Sequential(
        SubKernelConv(2, 4, (3, 3), rngs=nnx.Rngs(0)),
        ChannelSelectionConv(4, 4, (3, 3), rngs=nnx.Rngs(1)),
        ChannelSelectionConv(4, 4, (3, 3), norm=True, rngs=nnx.Rngs(2)),
        ChannelSelectionConv(4, 4, (3, 3), lowering="shifted", rngs=nnx.Rngs(3)),
        ChannelSelectionConv(4, 4, (3, 3), padding=-1, rngs=nnx.Rngs(4)),
    )
    network.eval()
    graph, state = nnx.split(network)
    x = normal((1, 8, 8, 2))[0]
    call = jax.jit(lambda x: nnx.merge(graph, state)(x))
    expected = call(x)
    counts = {}
    for name in ("composed", "grouped", "shifted", "auto"):
        with chansel_jax.lowering(name):
            counts[name] = call.lower(x).as_text().count("stablehlo.convolution")
            assert_close(call(x), expected, 1e-5)
    # Each layer but the one that asks for "shifted" is a convolution; the last lacks a padding.
    assert counts["composed"] == counts["grouped"] == 4 and counts["shifted"] == 2
    with (
        pytest.raises(ValueError, match="name='fused' must be one of 'auto'"),
        chansel_jax.lowering("fused"),
    ):
        pass


def test_multiply_adds_of_a_network_are_seen_by_xla():
    layer = ChannelSelectionConv(3, 5, (3, 3), use_bias=False, padding="VALID", rngs=nnx.Rngs(0))
    x = jnp.ones((1, 6, 7, 3))
    with chansel_jax.lowering("grouped"):
        counted = jax.jit(layer).lower(x).cost_analysis()["flops"]
    assert counted == 2 * (6 * 7 * 3 * 5 + 4 * 5 * 9 * 5)


def test_a_layer_made_where_a_lowering_is_asked_for_keeps_its_own():
    with chansel_jax.lowering("lax"):
        layer = SubKernelConv(2, 3, (3, 3), rngs=nnx.Rngs(0))
    assert layer.lowering == "auto"


def test_without_jit():
    x, pointwise, depthwise, _ = normal(*SHAPES)
    call = functools.partial(channel_selection, x, pointwise)
    with jax.disable_jit():
        found = jax.value_and_grad(lambda d: jnp.sum(call(d)))(depthwise)
    expected = jax.value_and_grad(lambda d: jnp.sum(call(d, lowering="composed")))(depthwise)
    assert_close(found, expected, 1e-5)


def test_other_explicit_shardings_are_for_lax():
    x, pointwise, depthwise, kernel = normal((2, 5, 4, 2), *SHAPES[1:])
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    expected = channel_selection(x, pointwise, depthwise)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(None, None, "data"))
        divided = jax.device_put(x, rows)
        others = jax.device_put(
            (pointwise, depthwise, kernel), NamedSharding(mesh, PartitionSpec())
        )
        for function, kernels in ((channel_selection, others[:2]), (dense_conv, others[2:])):
            with pytest.raises(ValueError, match="lowering='native' does not have explicit shard"):
                function(divided, *kernels, lowering="native")
        found = jax.jit(channel_selection)(divided, *others[:2])
    assert_close(found, expected, 1e-5)


@pytest.mark.parametrize("lowering", ["composed", "grouped", "auto"])
def test_float64_of_float32_parameters(lowering):
    with jax.enable_x64(True):
        operands = normal(*SHAPES, dtype=jnp.float32)[:3]
        wide = [o.astype(jnp.float64) for o in operands]
        found = channel_selection(wide[0], *operands[1:], lowering=lowering)
        assert_close(found, channel_selection(*wide, lowering="grouped"), 1e-14)


@pytest.mark.parametrize("switch", ["debug_nans", "numpy_dtype_promotion", "numpy_rank_promotion"])
def test_switches_of_jax(switch):
    values = {"numpy_dtype_promotion": "strict", "numpy_rank_promotion": "raise"}
    layer = ChannelSelectionConv(2, 3, (3, 3), rngs=nnx.Rngs(0))
    graph, state = nnx.split(layer)
    x = normal((1, 5, 5, 2))[0]
    with getattr(jax, switch)(values.get(switch, True)):
        loss = jax.jit(lambda state: jnp.sum(jnp.square(nnx.merge(graph, state)(x))))
        gradients = jax.grad(loss)(state)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
