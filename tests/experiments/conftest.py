"""A small run that the tests of several commands share."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import types

import jax
import numpy as np
import pytest
import tyro
from commands import Command
from filelock import FileLock
from PIL import Image
from rich.console import Console

from chansel_jax.training.optimizer import OptimizerSettings
from experiments.benchmarking import workers
from experiments.training import run
from experiments.training.settings import DataSettings, NetworkSettings, Settings, TrainingSettings

WORKERS_IMPORT = (
    "experiments.benchmarking.contestants.jax_side",
    "experiments.benchmarking.contestants.torch_side",
    "torch._dynamo",
)
# For its docstrings Tyro reads the source of every class of settings anew for each command.
source = tyro._docstrings._ClassTokenization
source.make = staticmethod(functools.cache(source.make.__wrapped__))
COLOURS = {"blue": (60, 90, 200), "green": (60, 200, 90), "red": (200, 60, 60)}


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Makes a folder for all processes of the session, by a function of its path."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # which the processes share

    def made(name, make):
        made_by_all = root / "shared" / name
        made_by_all.parent.mkdir(exist_ok=True)
        with FileLock(f"{made_by_all}.lock"):
            if not made_by_all.exists():
                make(made_by_all)
        return made_by_all

    return made


@pytest.fixture(scope="session")
def images(made_once):
    """A folder of noisy squares of three colours: 3 × 60 for training, 3 × 9 for validation."""
    return made_once("images", draw_images)


def draw_images(root):
    rng = np.random.default_rng(0)
    for split, count in (("train", 60), ("validation", 9)):
        for name, colour in COLOURS.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(colour, 20, (8, 8, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def forked_workers():
    """Has a benchmark's workers start from a process that has imported what they do."""

    def popen(arguments, env, pass_fds, start_new_session, **_):
        words = arguments[arguments.index("-m") + 1 :]
        return running.enter_context(
            Command(words, env, start_new_session, pass_fds, imported=WORKERS_IMPORT)
        )

    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as running:
        patch.setattr(workers, "subprocess", types.SimpleNamespace(Popen=popen, DEVNULL=None))
        yield


@pytest.fixture(autouse=True)
def switches_of_commands():
    """Those of JAX that a command sets for its process, as they were in the end."""
    names = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_include_metadata_in_key",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_remove_custom_partitioning_ptr_from_cache_key",
    )
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(autouse=True, scope="module")
def initial_parameters_by_numpy():
    """Here runs of this process are held against those of others: both draw as users' do."""


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory):
    """Prepared data sets stay out of the user's own folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def settings(images, tmp_path_factory):
    """Of a run of three epochs."""
    return Settings(
        network=NetworkSettings(blocks=(1,), width=4),
        data=DataSettings(dataset="folder", data_dir=images),
        training=TrainingSettings(
            optimization=OptimizerSettings(learning_rate=0.01, warmup_fraction=0.2),
            epochs=3,
            batch_size=16,
        ),
        workdir=tmp_path_factory.mktemp("runs") / "whole",
    )


@pytest.fixture(scope="session")
def whole(made_once, settings):
    """That run, uninterrupted: its summary and what was printed."""
    trained = made_once("whole", lambda folder: train(folder, settings))
    shutil.copytree(trained / "run", settings.workdir)
    summary = json.loads((trained / "run" / "summary.json").read_text())
    return summary, (trained / "printed").read_text()


@pytest.fixture(scope="session")
def dense(made_once, settings, tmp_path_factory):
    """The folder of a run of the dense network."""
    of_dense = dataclasses.replace(settings, conv="subkernel")
    trained = made_once("dense", lambda folder: train(folder, of_dense))
    return shutil.copytree(trained / "run", tmp_path_factory.mktemp("dense") / "run")


def train(folder, settings):
    console = Console(file=io.StringIO(), width=120)
    run.train_and_evaluate(dataclasses.replace(settings, workdir=folder / "run"), console)
    (folder / "printed").write_text(console.file.getvalue())
