"""The native lowering's own promises: instruction sets, threads, and how it is built."""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layers import assert_close, in_torch, normal

from chansel_jax.ops import native
from chansel_jax.ops.lowerings import fastest_dense, fastest_depthwise, fastest_layer, here
from chansel_jax.ops.window import Window

REPOSITORY = Path(__file__).parents[2]
COMPILED = [native] if native.available() else []  # nothing of it to test where it was not compiled

NETWORK = """
import functools, jax, jax.numpy as jnp, numpy as np
from flax import nnx
from chansel_jax import ChannelSelectionConv, ResNet, ResNetConfig
from chansel_jax.functional import apply_function, network_tree
def gradients(lowering):
    conv = functools.partial(ChannelSelectionConv, lowering=lowering)
    config = ResNetConfig(conv=conv, num_classes=3, blocks=(1, 1), width=8, stem="plain")
    network = ResNet(config, rngs=nnx.Rngs(0))
    apply, tree = apply_function(network, train=True), network_tree(network)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16, 16, 3), np.float32))
    def loss(params):
        logits, stats = apply(params, tree["batch_stats"], images, jax.random.key(0))
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[:, 0]), stats
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(tree["params"])
# On one device "auto" is the native lowering, wherever that is the faster.
for e, a in zip(*map(jax.tree.leaves, map(gradients, ("grouped", "auto"))), strict=True):
    np.testing.assert_allclose(a, e, rtol=0, atol=1e-4 * max(abs(e).max(), 1e-2))
print(jax.device_count())
"""
DIGEST = """
import functools, hashlib, jax, numpy as np
from chansel_jax.ops import native
from chansel_jax.ops.norm import batch_norm
from chansel_jax.ops.window import Window
rng = np.random.default_rng(0)
x, p, d, k = (
    rng.standard_normal(s, np.float32) for s in ((100, 9, 8, 5), (5, 7), (3, 3, 1, 7), (3, 3, 5, 7))
)
for function, *operands in ((native.channel_selection, x, p, d), (native.dense_conv, x, k)):
    y, pull_back = jax.vjp(lambda *operands: function(*operands, Window.of()), *operands)
    found = y, *pull_back(y), *function(*operands, Window.of(), moments=True), *native.moments(y)
    print(hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in found)).hexdigest())
x = rng.standard_normal((70, 40, 9, 5), np.float32)
of_norm = functools.partial(batch_norm, relu=True)
(y, *others), pull_back = jax.vjp(of_norm, x, x[0, 0, 0], x[0, 0, 1], x)
found = y, *others, *pull_back((y, *others))
print(hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in found)).hexdigest())
"""
THREADS = """
from pathlib import Path
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
print(sum(name.startswith("tf_XLAEigen") for name in names))
"""


def shapes(channels, *, rank=1, dtype="float32"):
    """The input and both kernels of a layer of `channels`: depthwise and dense."""
    every = (1, 8, 8, channels), (3, 3, rank, channels), (3, 3, channels, channels)
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in every]


def layer_choice(channels, **options):
    x, depthwise, _ = shapes(channels, **options)
    return fastest_layer(here(), x, depthwise)


def printed(program, **environment):
    """The words that a process of its own, with one CPU device, prints."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize("library", COMPILED)
def test_a_network_on_one_device_like_one_of_grouped(library):
    assert printed(NETWORK) == ["1"]


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize(
    ("name", "kernels"),
    [("channel_selection", [(21, 2 * 35), (3, 3, 2, 35)]), ("dense_conv", [(3, 3, 21, 35)])],
)
def test_every_instruction_set_like_torch(library, name, kernels):
    window = {"strides": (2, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        *operands, dy = normal((3, 9, 8, 21), *kernels, (3, 5, 8, 35), dtype=dtype)
        expected, used = in_torch(*operands, dy, **window), set()
        for most in library.INSTRUCTION_SETS:
            library.limit_instruction_set(most)
            used.add(library.instruction_set())
            call = functools.partial(getattr(library, name), window=Window.of(**window))
            y, pull_back = jax.vjp(call, *operands)
            assert_close((y, *pull_back(dy)), expected, tolerance)
        assert "baseline" in used


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize("channels", [16, 24, 32])
def test_large_arrays_are_written_past_the_caches_and_hold_the_same(library, channels):
    """Of a batch whose arrays pass the caches, an image is what it is alone, to the last bit."""
    shape = (5, 120, 128, channels)
    assert 4 * np.prod(shape) >= 4 << 20 > 4 * np.prod(shape[1:])
    x, pointwise, depthwise, dense, dy = normal(
        *(shape, (channels, channels), (3, 3, 1, channels), (3, 3, channels, channels), shape)
    )
    calls = [
        lambda x: library.channel_selection(x, pointwise, depthwise, Window.of()),
        lambda x: library.dense_conv(x, dense, Window.of()),
    ]
    for most in library.INSTRUCTION_SETS:
        library.limit_instruction_set(most)
        for call in calls:
            (y, pull_back), (of_one, pull_back_one) = jax.vjp(call, x), jax.vjp(call, x[3:4])
            np.testing.assert_array_equal(y[3:4], of_one)
            np.testing.assert_array_equal(pull_back(dy)[0][3:4], pull_back_one(dy[3:4])[0])


@pytest.mark.parametrize("library", COMPILED)
def test_a_wrong_instruction_set(library):
    with pytest.raises(ValueError, match="most='sse9'"):
        library.limit_instruction_set("sse9")


@pytest.mark.parametrize("library", COMPILED)
def test_an_instruction_set_by_environment(library):
    program = "from chansel_jax.ops import native; print(native.instruction_set())"
    assert printed(program, CHANSEL_JAX_INSTRUCTION_SET="baseline") == ["baseline"]


@pytest.mark.parametrize("library", COMPILED)
def test_gradients_do_not_depend_on_the_number_of_threads(library):
    (*digests_of_one, one), (*digests_of_five, five) = (
        printed(DIGEST + THREADS, PJRT_NPROC=wanted) for wanted in ("1", "5")
    )
    assert int(one) < int(five)
    assert [len(digest) for digest in digests_of_one] == [len(hashlib.sha256().hexdigest())] * 3
    assert digests_of_one == digests_of_five


@pytest.mark.parametrize("library", COMPILED)
def test_large_images_are_taken_in_parts(library):
    """Images whose sums do not fit into the cache, whose seams are computed twice."""
    for strides in ((1, 1), (2, 3)):
        window = Window.of(strides)
        size = window.output_size((70, 90), (5, 3))
        *operands, dy = normal((1, 70, 90, 3), (3, 40), (5, 3, 1, 40), (1, *size, 40))
        y, pull_back = jax.vjp(lambda *o, w=window: library.channel_selection(*o, w), *operands)
        given = {name: getattr(window, name) for name in ("strides", "padding", "dilation")}
        expected = in_torch(*operands, dy, **given)
        assert_close((y, *pull_back(dy)), expected, 1e-5)


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize(
    "wrong",
    [
        ((1, 8, 8, 4), (2, 3), (3, 3, 1, 3)),
        ((1, 8, 8, 4), (4, 3), (3, 3, 1, 5)),
        ((1, 8, 8, 4), (4, 3), (3, 3, 3, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_memory_is_touched(library, wrong):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"C_in, C_out\*R"):
        jax.block_until_ready(library.channel_selection(*map(jnp.ones, wrong), Window.of()))


@pytest.mark.parametrize("library", COMPILED)
def test_a_dense_kernel_of_other_channels_is_refused_too(library):
    with pytest.raises(jax.errors.JaxRuntimeError, match="K_h, K_w, C_in, C_out"):
        operands = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 5, 2))
        jax.block_until_ready(library.dense_conv(*operands, Window.of()))


@pytest.mark.parametrize("library", COMPILED)
def test_want_of_memory_is_an_error_not_the_end(library):
    """A tile that has more bytes than there are addresses."""
    operands = [jnp.ones(shape) for shape in ((1, 4, 4, 2), (2, 64), (3, 3, 1, 64))]
    window = Window.of(2**41, ((1, 1), (2**38, 2**38)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        jax.block_until_ready(library.channel_selection(*operands, window))
    # And the threads are still there.
    y = library.channel_selection(*operands, Window.of())
    np.testing.assert_array_equal(y[0, 1, 1], 9 * 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        kernel = jnp.ones((3, 3, 2, 64))
        jax.block_until_ready(library.dense_conv(operands[0], kernel, window))
    y = library.dense_conv(operands[0], kernel, Window.of())
    np.testing.assert_array_equal(y[0, 1, 1], 9 * 2)


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize("kernel_size, pad", [((1, 2), 2**58 - 8), ((2, 2), 2**60 - 7)])
def test_sizes_beyond_64_bits_are_refused(library, kernel_size, pad):
    x, window = jnp.ones((1, 2, 8, 16)), Window.of(2**45, ((0, 0), (pad, 0)))
    with pytest.raises(ValueError, match=f"padding=.*{pad}.*more than any memory holds"):
        library.dense_conv(x, jnp.ones((*kernel_size, 16, 8)), window)
    with pytest.raises(ValueError, match=f"padding=.*{pad}.*more than any memory holds"):
        library.channel_selection(x, jnp.ones((16, 8)), jnp.ones((*kernel_size, 1, 8)), window)


@pytest.mark.parametrize("library", COMPILED)
def test_steps_beyond_the_image_are_one_output(library):
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    y = library.dense_conv(x, jnp.ones((3, 3, 2, 1)), Window.of(2**60, "VALID"))
    np.testing.assert_array_equal(y, x[:, :3, :3].sum().reshape(1, 1, 1, 1))


@pytest.mark.parametrize("library", COMPILED)
def test_second_derivatives_are_refused(library):
    operands = [jnp.ones(shape) for shape in ((1, 4, 4, 2), (2, 3), (3, 3, 1, 3))]

    def slope(x):
        call = functools.partial(library.channel_selection, window=Window.of())
        return jnp.sum(jax.grad(lambda x: jnp.sum(call(x, *operands[1:])))(x))

    with pytest.raises(TypeError, match="first derivatives only.*'grouped'"):
        jax.grad(slope)(operands[0])


@pytest.mark.parametrize("library", COMPILED)
def test_a_library_that_cannot_be_loaded_is_as_none(library, monkeypatch, tmp_path):
    broken = tmp_path / "_handlers.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(library, "_library", library._library.__wrapped__)
    assert not library.available()
    assert "install the package again" in library.why_not()
    assert layer_choice(16) == "shifted"


@pytest.mark.parametrize("library", COMPILED)
def test_an_older_jaxlib_than_it_was_compiled_for(library, monkeypatch):
    assert 3 <= library._installed_api_version() < 1000
    monkeypatch.setattr(library, "_installed_api_version", lambda: 2)
    monkeypatch.setattr(library, "_library", library._library.__wrapped__)
    assert "install a later jaxlib" in library.why_not()
    assert layer_choice(16) == "shifted"


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize("dtypes", [("float16",) * 3, ("float32", "float32", "bfloat16")])
def test_wrong_dtypes(library, dtypes):
    every = (1, 4, 4, 2), (2, 3), (3, 3, 1, 3)
    operands = [jnp.zeros(shape, dtype) for shape, dtype in zip(every, dtypes, strict=True)]
    with pytest.raises(ValueError, match="float16|bfloat16"):
        library.channel_selection(*operands, Window.of())


@pytest.mark.parametrize(
    ("instructions", "widest", "widest_dense"),
    [("avx512", 255, 256), ("avx2", 127, 128), ("baseline", 0, 0), (None, 0, 0)],
)
def test_what_auto_chooses_on_a_cpu(monkeypatch, instructions, widest, widest_dense):
    monkeypatch.setattr(native, "available", lambda: instructions is not None)
    monkeypatch.setattr(native, "instruction_set", lambda: instructions)
    for channels in (16, 63, 64, 127, 128, 129, 255, 256, 512):
        fits = channels <= widest
        assert layer_choice(channels) == ("native" if fits else "shifted")
        assert layer_choice(channels, dtype="float16") == "shifted"
        assert fastest_depthwise(here(), shapes(channels)[0]) == "shifted"
        dense = "native" if channels <= widest_dense else "lax"
        assert fastest_dense(here(), shapes(channels)[2]) == dense
        assert fastest_dense(here(), shapes(channels, dtype="float16")[2]) == "lax"


@pytest.mark.parametrize(
    ("channels", "rank", "chosen"),
    [
        (16, 2, "native"),
        (16, 3, "composed_native"),
        (32, 3, "composed_native"),
        (64, 4, "native"),
        (64, 5, "composed_native"),
        (128, 9, "composed_native"),
    ],
)
def test_what_auto_chooses_of_many_ranks(monkeypatch, channels, rank, chosen):
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "instruction_set", lambda: "avx512")
    assert layer_choice(channels, rank=rank) == chosen
    assert layer_choice(channels, rank=rank, dtype="bfloat16") in ("native", "shifted")


def test_what_auto_chooses_on_other_devices(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert layer_choice(16) == "composed"
    assert fastest_depthwise(here(), shapes(16)[0]) == "grouped"


def test_compiled_wherever_there_is_a_compiler():
    assert native.available() or not shutil.which("c++")
