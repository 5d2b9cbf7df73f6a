"""The package as others install it: what the wheel holds and needs, and what an import loads."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import Tag
from packaging.utils import parse_wheel_filename

REPOSITORY = Path(__file__).parents[1]
LIBRARY = "chansel_jax/ops/native/_handlers.so"
NEEDED = ("jax", "flax", "numpy")
FOR_TRAINING = (
    *("tensorflow_datasets", "array_record", "grain", "PIL", "requests", "torch"),
    *("matplotlib", "tensorboardX", "tyro"),
)
FLAX_BRINGS = ("orbax", "tensorstore")

SERVES_NETWORKS = [
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__")
    for path in sorted((REPOSITORY / "chansel_jax").rglob("*.py"))
    if path.relative_to(REPOSITORY).parts[1] not in ("training", "data")
    and path.name != "build_backend.py"
]

IMPORT = """
import importlib, sys
serves_networks, for_training = (words.split() for words in sys.argv[1:])
for name in serves_networks:
    importlib.import_module(name)
    loaded = [other for other in for_training if other in sys.modules]
    assert not loaded, f"{name} loads {loaded}"
"""

# Prints what is installed, why there is no library, and that both lowerings agree.
LAYER = """
import functools, importlib, importlib.metadata, importlib.util, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
import chansel_jax
from chansel_jax.ops import native
lowering, serves_networks, for_training = sys.argv[1:]
assert not list(filter(importlib.util.find_spec, for_training.split()))
for name in serves_networks.split():
    assert importlib.import_module(name).__file__.startswith(sys.prefix)
def loss(layer, x):
    y = layer(x)
    return jnp.sum(y * jnp.cos(y)), y
@functools.partial(jax.jit, static_argnums=0)
def outputs(lowering):
    layer = chansel_jax.ChannelSelectionConv(
        5, 7, (3, 3), strides=2, use_bias=True, lowering=lowering, rngs=nnx.Rngs(0)
    )
    x = jax.random.normal(jax.random.key(1), (2, 9, 8, 5))
    return jax.tree.leaves(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x))
print(*(distribution.name for distribution in importlib.metadata.distributions()))
print(native.why_not())
for a, e in zip(outputs(lowering), outputs("composed"), strict=True):
    np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * abs(e).max())
print("agree")
"""


def run(*command, **environment) -> str:
    """Runs a command that sees nothing of this repository, and returns what it printed."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env={**own, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of_sources(folder: Path) -> Path:
    folder.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(REPOSITORY / name, folder)
    built = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in ("chansel_jax", "experiments", "tests"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=built)
    return folder


def requirements(names) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions of these names, and all that they require."""
    found, todo = {}, [Requirement(name) for name in names]
    while todo:
        wanted = todo.pop()
        distribution = importlib.metadata.distribution(wanted.name)
        if found.setdefault((distribution.name, *wanted.extras), distribution) is not distribution:
            continue
        for requirement in map(Requirement, distribution.requires or ()):
            marker, extras = requirement.marker, wanted.extras or ("",)
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(requirement)
    return {name: distribution for (name, *_), distribution in found.items()}


def fresh_environment(folder: Path) -> tuple[Path, set[str]]:
    """A virtual environment with `NEEDED` and what they require; its Python, and their names."""
    venv.create(folder, symlinks=True)
    installed = requirements(NEEDED)
    links = folder / "links"
    links.mkdir()
    for distribution in installed.values():
        for name in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (links / name).exists():  # several may share a namespace
                (links / name).symlink_to(distribution.locate_file(name))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "lib" / version / "site-packages" / "links.pth").write_text(f"{links}\n")
    return folder / "bin" / "python", set(installed)


def stand_in_for_a_compiler(folder: Path) -> dict[str, str]:
    """Variables of a build that takes the library which the installation compiled a while ago."""
    script = folder / "compiler"
    copy = f'cp "{REPOSITORY / LIBRARY}" "$2"'
    script.write_text(f'#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\n{copy}\n')
    script.chmod(0o755)
    return {"CC": str(script), "CXX": str(script)}


@pytest.mark.parametrize("compiler", [True, False], ids=["compiler", "no_compiler"])
def test_wheel_in_a_fresh_environment(tmp_path, compiler):
    compiled = compiler and (REPOSITORY / LIBRARY).exists()
    sources = copy_of_sources(tmp_path / "sources")
    content = {
        path.relative_to(sources).as_posix()
        for path in (sources / "chansel_jax").rglob("*")
        if path.is_file() and path.suffix not in (".cc", ".h", ".md")
    }
    pip = sys.executable, "-m", "pip"
    missing = {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    build = "wheel", "--no-index", "--no-deps", "--no-build-isolation", f"--wheel-dir={tmp_path}"
    run(*pip, *build, sources, **(stand_in_for_a_compiler(tmp_path) if compiled else missing))
    [wheel] = tmp_path.glob("*.whl")

    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    tags = {Tag("py3", "none", platform if compiled else "any")}
    assert parse_wheel_filename(wheel.name)[3] == tags
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == (content | {LIBRARY} if compiled else content)
    assert "chansel_jax/py.typed" in names

    python, installed = fresh_environment(tmp_path / "environment")
    # With no index to ask, pip refuses a wheel that requires more.
    run(*pip, "--python", python, "install", "--no-index", "--no-compile", wheel)
    lowering = "native" if compiled else "auto"
    arguments = lowering, " ".join(SERVES_NETWORKS), " ".join(FOR_TRAINING)
    printed = run(python, "-I", "-c", LAYER, *arguments, JAX_PLATFORMS="cpu")
    found, why_not, agree = printed.splitlines()
    assert set(found.split()) == {*installed, "chansel-jax"}
    assert why_not.startswith("it was not compiled") != compiled
    assert agree == "agree"


def test_what_serves_networks_loads_nothing_for_training():
    for_training = (*FOR_TRAINING, *FLAX_BRINGS)
    assert all(map(importlib.util.find_spec, for_training))  # or it would hold of itself
    assert {"chansel_jax", "chansel_jax.conv", "chansel_jax.factorize"} < set(SERVES_NETWORKS)
    arguments = " ".join(SERVES_NETWORKS), " ".join(for_training)
    run(sys.executable, "-c", IMPORT, *arguments, PYTHONPATH=str(REPOSITORY))
