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

from chansel_jax import native
from chansel_jax.lowerings import Case, fastest_depthwise, fastest_layer
from chansel_jax.selection import channel_selection

REPOSITORY = Path(__file__).parents[1]
COMPILED = [native] if native.available() else []  # nothing of it to test where it was not compiled
CASE = Case("float32", 16, 16, (3, 3), (1, 1), 1)

DIGEST = """
import hashlib, jax, numpy as np
from chansel_jax.selection import channel_selection
rng = np.random.default_rng(0)
x, p, d = (rng.standard_normal(s, np.float32) for s in ((100, 9, 8, 5), (5, 7), (3, 3, 1, 7)))
y, pull_back = jax.vjp(lambda *a: channel_selection(*a, lowering="native"), x, p, d)
print(hashlib.sha256(b"".join(np.asarray(a).tobytes() for a in (y, *pull_back(y)))).hexdigest())
"""


@pytest.mark.parametrize("library", COMPILED)
def test_instruction_sets_agree(library):
    rng = np.random.default_rng(0)
    shapes = (3, 9, 8, 21), (21, 2 * 35), (3, 3, 2, 35), (3, 5, 8, 35)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        x, p, d, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes)
        call = functools.partial(library.channel_selection, strides=(2, 1), padding=1)
        results = {}
        for most in library.INSTRUCTION_SETS:
            used = library.limit_instruction_set(most)
            y, pull_back = jax.vjp(call, x, p, d)
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
    def digest(threads):
        environment = {**os.environ, "PJRT_NPROC": threads, "JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=environment,
            cwd=REPOSITORY,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    assert len(digest("1").strip()) == len(hashlib.sha256().hexdigest())
    assert digest("1") == digest("5")


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
@pytest.mark.parametrize("dtypes", [("float16",) * 3, ("float32", "float32", "bfloat16")])
def test_wrong_dtypes(library, dtypes):
    shapes = (1, 4, 4, 2), (2, 3), (3, 3, 1, 3)
    operands = [jnp.zeros(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises(ValueError, match="float16|bfloat16"):
        library.channel_selection(*operands)


@pytest.mark.parametrize("devices", [1, 2])
def test_what_auto_chooses_on_a_cpu(monkeypatch, devices):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    compiled = devices == 1 and native.available()
    assert fastest_layer(CASE) == ("native" if compiled else "shifted")
    assert fastest_layer(dataclasses.replace(CASE, in_channels=512, out_channels=512)) == "shifted"
    assert fastest_layer(dataclasses.replace(CASE, dtype="float16")) == "shifted"
    assert fastest_depthwise(CASE) == "shifted"
    monkeypatch.setattr(native, "_library", lambda: None)
    assert fastest_layer(CASE) == "shifted"


def test_what_auto_chooses_on_other_devices(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert fastest_layer(CASE) == "composed"
    assert fastest_depthwise(CASE) == "grouped"


def test_compiled_wherever_there_is_a_compiler():
    assert native.available() or not shutil.which("c++")


def test_without_a_compiler_the_package_is_built_without_the_library(tmp_path):
    tree = tmp_path / "tree"
    shutil.copytree(
        REPOSITORY, tree, ignore=shutil.ignore_patterns("*.so", ".git", "build", "results", "runs")
    )
    build = (
        "import sys; sys.path.insert(0, 'chansel_jax/native'); import build_backend; "
        f"print(build_backend.build_wheel({str(tmp_path)!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", build],
        cwd=tree,
        env={**os.environ, "CC": "no-such-compiler", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], check=True, capture_output=True, text=True
    ).stdout
    assert "chansel_jax/native/handlers.cc" in names
    assert "_handlers." not in names
