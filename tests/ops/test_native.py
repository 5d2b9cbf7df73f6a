"""The native lowering's own promises: instruction sets, threads, and how it is built."""

import dataclasses
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

from chansel_jax.ops import native
from chansel_jax.ops.lowerings import Case, fastest_dense, fastest_depthwise, fastest_layer
from chansel_jax.ops.selection import channel_selection

REPOSITORY = Path(__file__).parents[2]
COMPILED = [native] if native.available() else []  # nothing of it to test where it was not compiled
CASE = Case("float32", in_channels=16, out_channels=16, rank=1)

NETWORK = """
import functools, jax, jax.numpy as jnp, numpy as np
from flax import nnx
from chansel_jax import ChannelSelectionConv, resnet14, training
def gradients(lowering):
    conv = functools.partial(ChannelSelectionConv, lowering=lowering)
    network = resnet14(conv, num_classes=3, width=8, rngs=nnx.Rngs(0))
    apply, tree = training.apply_function(network, train=True), training.network_tree(network)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((8, 16, 16, 3), np.float32))
    def loss(params):
        logits, stats = apply(params, tree["batch_stats"], images, jax.random.key(0))
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[:, 0]), stats
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(tree["params"])
expected = gradients("grouped")
for lowering in ("native", "auto"):
    for e, a in zip(*map(jax.tree.leaves, (expected, gradients(lowering))), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-4 * max(abs(e).max(), 1e-2))
print(jax.device_count())
"""
DIGEST = """
import hashlib, jax, numpy as np
from chansel_jax import native
rng = np.random.default_rng(0)
x, p, d, k = (
    rng.standard_normal(s, np.float32) for s in ((100, 9, 8, 5), (5, 7), (3, 3, 1, 7), (3, 3, 5, 7))
)
for function, *operands in ((native.channel_selection, x, p, d), (native.dense_conv, x, k)):
    y, pull_back = jax.vjp(function, *operands)
    print(hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in (y, *pull_back(y)))).hexdigest())
"""
THREADS = """
from pathlib import Path
names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
print(sum(name.startswith("tf_XLAEigen") for name in names))
"""


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
def test_a_network_of_it_like_one_of_grouped(library):
    assert printed(NETWORK) == ["1"]


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize(
    ("name", "kernels"),
    [("channel_selection", [(21, 2 * 35), (3, 3, 2, 35)]), ("dense_conv", [(3, 3, 21, 35)])],
)
def test_instruction_sets_agree(library, name, kernels):
    rng = np.random.default_rng(0)
    shapes = (3, 9, 8, 21), *kernels, (3, 5, 8, 35)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        *operands, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
        call = functools.partial(getattr(library, name), strides=(2, 1), padding=1)
        results = {}
        for most in library.INSTRUCTION_SETS:
            library.limit_instruction_set(most)
            used = library.instruction_set()
            y, pull_back = jax.vjp(call, *operands)
            results[used] = [np.asarray(a, np.float64) for a in (y, *pull_back(dy))]
        assert "baseline" in results
        for result in results.values():
            for actual, expected in zip(result, results["baseline"], strict=True):
                atol = tolerance * np.abs(expected).max()
                np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("library", COMPILED)
def test_a_wrong_instruction_set(library):
    with pytest.raises(ValueError, match="most='sse9'"):
        library.limit_instruction_set("sse9")


@pytest.mark.parametrize("library", COMPILED)
def test_gradients_do_not_depend_on_the_number_of_threads(library):
    (*digests_of_one, one), (*digests_of_five, five) = (
        printed(DIGEST + THREADS, PJRT_NPROC=wanted) for wanted in ("1", "5")
    )
    assert int(one) < int(five)
    assert [len(digest) for digest in digests_of_one] == [len(hashlib.sha256().hexdigest())] * 2
    assert digests_of_one == digests_of_five


@pytest.mark.parametrize("library", COMPILED)
def test_large_images_are_taken_in_parts(library):
    """Images whose sums do not fit into the cache, whose seams are computed twice."""
    rng = np.random.default_rng(0)
    shapes = (1, 70, 90, 3), (3, 40), (5, 3, 1, 40)
    operands = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    for strides in (1, (2, 3)):
        results = []
        for lowering in ("native", "composed"):
            call = functools.partial(channel_selection, strides=strides, lowering=lowering)
            y, pull_back = jax.vjp(call, *operands)
            results.append([y, *pull_back(y)])
        for actual, expected in zip(*results, strict=True):
            atol = 1e-5 * float(jnp.abs(expected).max())
            np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 8, 8, 4), (2, 3), (3, 3, 1, 3)),
        ((1, 8, 8, 4), (4, 3), (3, 3, 1, 5)),
        ((1, 8, 8, 4), (4, 3), (3, 3, 3, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_memory_is_touched(library, shapes):
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"C_in, C_out\*R"):
        jax.block_until_ready(library.channel_selection(*map(jnp.ones, shapes)))


@pytest.mark.parametrize("library", COMPILED)
def test_a_dense_kernel_of_other_channels_is_refused_too(library):
    with pytest.raises(jax.errors.JaxRuntimeError, match="K_h, K_w, C_in, C_out"):
        jax.block_until_ready(library.dense_conv(jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 5, 2))))


@pytest.mark.parametrize("library", COMPILED)
def test_want_of_memory_is_an_error_not_the_end(library):
    """A tile that has more bytes than there are addresses."""
    operands = [jnp.ones(shape) for shape in ((1, 4, 4, 2), (2, 64), (3, 3, 1, 64))]
    padding = ((1, 1), (2**38, 2**38))
    call = functools.partial(library.channel_selection, padding=padding, strides=2**41)
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        jax.block_until_ready(call(*operands))
    # And the threads are still there.
    y = library.channel_selection(*operands)
    np.testing.assert_array_equal(y[0, 1, 1], 9 * 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="out of memory"):
        kernel = jnp.ones((3, 3, 2, 64))
        call = functools.partial(library.dense_conv, padding=padding, strides=2**41)
        jax.block_until_ready(call(operands[0], kernel))
    np.testing.assert_array_equal(library.dense_conv(operands[0], kernel)[0, 1, 1], 9 * 2)


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize("kernel_size, pad", [((1, 2), 2**58 - 8), ((2, 2), 2**60 - 7)])
def test_sizes_beyond_64_bits_are_refused(library, kernel_size, pad):
    x, window = jnp.ones((1, 2, 8, 16)), {"padding": ((0, 0), (pad, 0)), "strides": 2**45}
    with pytest.raises(ValueError, match=f"padding=.*{pad}.*more than any memory holds"):
        library.dense_conv(x, jnp.ones((*kernel_size, 16, 8)), **window)
    with pytest.raises(ValueError, match=f"padding=.*{pad}.*more than any memory holds"):
        library.channel_selection(x, jnp.ones((16, 8)), jnp.ones((*kernel_size, 1, 8)), **window)


@pytest.mark.parametrize("library", COMPILED)
def test_steps_beyond_the_image_are_one_output(library):
    x = jnp.arange(32.0).reshape(1, 4, 4, 2)
    y = library.dense_conv(x, jnp.ones((3, 3, 2, 1)), strides=2**60, padding="VALID")
    np.testing.assert_array_equal(y, x[:, :3, :3].sum().reshape(1, 1, 1, 1))


@pytest.mark.parametrize("library", COMPILED)
def test_second_derivatives_are_refused(library):
    operands = [jnp.ones(shape) for shape in ((1, 4, 4, 2), (2, 3), (3, 3, 1, 3))]

    def slope(x):
        return jnp.sum(jax.grad(lambda x: jnp.sum(library.channel_selection(x, *operands[1:])))(x))

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
    assert fastest_layer(CASE) == "shifted"


@pytest.mark.parametrize("library", COMPILED)
def test_an_older_jaxlib_than_it_was_compiled_for(library, monkeypatch):
    assert 3 <= library._installed_api_version() < 1000
    monkeypatch.setattr(library, "_installed_api_version", lambda: 2)
    monkeypatch.setattr(library, "_library", library._library.__wrapped__)
    assert "install a later jaxlib" in library.why_not()
    assert fastest_layer(CASE) == "shifted"


@pytest.mark.parametrize("library", COMPILED)
@pytest.mark.parametrize("dtypes", [("float16",) * 3, ("float32", "float32", "bfloat16")])
def test_wrong_dtypes(library, dtypes):
    shapes = (1, 4, 4, 2), (2, 3), (3, 3, 1, 3)
    operands = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises(ValueError, match="float16|bfloat16"):
        library.channel_selection(*operands)


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize(
    ("instructions", "widest"), [("avx512", 255), ("avx2", 63), ("baseline", 0), (None, 0)]
)
def test_what_auto_chooses_on_a_cpu(monkeypatch, devices, instructions, widest):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    monkeypatch.setattr(native, "available", lambda: instructions is not None)
    monkeypatch.setattr(native, "instruction_set", lambda: instructions)
    for channels in (16, 63, 64, 255, 256, 512):
        case = dataclasses.replace(CASE, in_channels=channels, out_channels=channels)
        fits = devices == 1 and channels <= widest
        assert fastest_layer(case) == ("native" if fits else "shifted")
        assert fastest_layer(dataclasses.replace(case, dtype="float16")) == "shifted"
        assert fastest_depthwise(case) == "shifted"
        dense = "native" if devices == 1 and instructions in ("avx2", "avx512") else "lax"
        assert fastest_dense(case) == (dense if channels <= 128 else "lax")
        assert fastest_dense(dataclasses.replace(case, dtype="float16")) == "lax"


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
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "instruction_set", lambda: "avx512")
    case = dataclasses.replace(CASE, in_channels=channels, out_channels=channels, rank=rank)
    assert fastest_layer(case) == chosen
    assert fastest_layer(dataclasses.replace(case, dtype="bfloat16")) in ("native", "shifted")
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert fastest_layer(case) == "shifted"


def test_what_auto_chooses_on_other_devices(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert fastest_layer(CASE) == "composed"
    assert fastest_depthwise(CASE) == "grouped"


def test_compiled_wherever_there_is_a_compiler():
    assert native.available() or not shutil.which("c++")
