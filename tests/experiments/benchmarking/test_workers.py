"""Workers and rounds: who is asked what and when, and what becomes of one that fails."""

import contextlib
import io
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from chansel_jax import resnet14
from chansel_jax.training import devices
from chansel_jax.training.step import init_state
from experiments.benchmarking import rounds
from experiments.benchmarking.cases import Case, Contestant, LayerShape, Machine, Recipe, Task
from experiments.benchmarking.contestants import jax_side
from experiments.benchmarking.contestants.runner import Prepared
from experiments.benchmarking.contestants.weights import make_weights
from experiments.benchmarking.plan import torch_network
from experiments.benchmarking.rounds import Schedule, run_case
from experiments.benchmarking.workers import WorkerError, WorkerHandle, worker_environment

CASE = Case("layer", "resnet14", 2, 32, 3, "float32", layer=LayerShape(6, 3, 4, 3, 1))
RECIPE = Recipe(0.01, 0.1)


def make_task(framework, conv, variant, case=CASE):
    contestant = Contestant(framework, conv, variant)
    weights, network = make_weights(case, conv), torch_network(case, conv)
    return Task(case, contestant, Machine("cpu", 2), RECIPE, weights, network)


# One worker


def test_worker_that_is_killed_is_reported():
    with contextlib.closing(WorkerHandle("JAX", 1)) as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="its process died of signal SIGKILL"):
            worker.hear()
        with pytest.raises(WorkerError, match="died"):
            worker.ask("peak_memory")


def test_worker_that_fails_says_why_in_one_line_and_goes_on():
    with contextlib.closing(WorkerHandle("PyTorch", 2)) as worker:
        worker.hear()
        with pytest.raises(WorkerError, match="RuntimeError: CUDA graphs exist on GPUs only"):
            worker.ask("prepare", make_task("PyTorch", "chansel", "max_autotune"))
        prepared = worker.ask("prepare", make_task("PyTorch", "chansel", "eager"))
        assert prepared.outputs["output"].shape == (2, 6, 6, 4)
        assert worker.ask("round", 2, 1) > 0
        assert worker.ask("peak_memory") > 10**7


def test_network_is_compiled_or_the_compiler_missed(forked_workers):
    task = make_task("PyTorch", "subkernel", "compiled")
    with contextlib.closing(WorkerHandle("PyTorch", 2)) as worker:
        worker.hear()
        if shutil.which("c++") or shutil.which("g++"):
            prepared = worker.ask("prepare", task)
            assert prepared.compile_seconds > prepared.step_seconds
        else:
            with pytest.raises(WorkerError, match="(?i)compiler"):
                worker.ask("prepare", task)


def test_environment_gives_every_worker_one_gpu_and_leaves_its_memory_to_others():
    jax_variables = worker_environment({"CUDA_VISIBLE_DEVICES": "3,4", "HOME": "/h"}, "JAX", 2)
    assert jax_variables["CUDA_VISIBLE_DEVICES"] == "3"
    assert jax_variables["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
    assert jax_variables["HOME"] == "/h"
    given = {"JAX_TRANSFER_GUARD": "disallow"}
    assert worker_environment(given, "JAX", 2)["JAX_TRANSFER_GUARD"] == "allow"
    torch_variables = worker_environment({}, "PyTorch", 5)
    assert torch_variables["CUDA_VISIBLE_DEVICES"] == "0"
    assert torch_variables["OMP_NUM_THREADS"] == "5"


def test_step_under_strict_promotion_of_dtypes():
    network = resnet14(width=4, blocks=(1,), rngs=nnx.Rngs(0))
    optimizer = jax_side.make_adamw(Recipe(0.1, 0.1))
    state = init_state(network, optimizer, 0, devices.data_mesh())
    images, labels = jnp.zeros((2, 8, 8, 3)), jnp.zeros(2, jnp.int32)
    with jax.numpy_dtype_promotion("strict"):
        step = jax_side.make_step(network, optimizer)
        _, loss = jax.eval_shape(step, state, images, labels)
    assert loss.dtype == jnp.float32 and loss.shape == ()


# Rounds


class FakeWorker:
    """Notes what it is asked for; fails where told to."""

    log: list = []
    failing: dict = {}

    def __init__(self, framework, threads):
        self.contestant = None
        self.timed = 0

    def hear(self):
        pass

    def ask(self, request, *arguments):
        if request == "prepare":
            self.contestant = arguments[0].contestant
        self.log.append((self.contestant.variant, request))
        if self.failing.get((self.contestant.variant, request)) == self.timed:
            raise WorkerError("out of luck")
        if request == "prepare":
            return Prepared(1.5, 0.1, {"output": np.ones(3)})
        if request == "round":
            self.timed += 1
            return 1.0 * self.timed
        return 7

    def close(self):
        self.log.append((self.contestant.variant, "close"))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(rounds, "WorkerHandle", FakeWorker)
    monkeypatch.setattr(rounds, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(FakeWorker, "log", [])
    monkeypatch.setattr(FakeWorker, "failing", {})
    return FakeWorker


def run_fakes(schedule, *variants):
    console = Console(file=io.StringIO(), width=100)
    tasks = [make_task("JAX", "chansel", variant) for variant in variants]
    return run_case(tasks, schedule, console), console.file.getvalue()


def test_every_round_visits_all_in_an_order_of_its_own(fake):
    result, _ = run_fakes(Schedule(12), "a", "b", "c")
    visits = [variant for variant, request in fake.log if request == "round"]
    by_round = [tuple(visits[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in by_round)
    assert len(set(by_round)) > 2
    assert [timing.seconds for timing in result.timings] == [tuple(map(float, range(1, 13)))] * 3
    assert result.timings[0].compile_seconds == 1.5 and result.timings[0].peak_memory == 7


def test_training_begins_anew_before_every_run(fake):
    run_fakes(Schedule(2, runs=2, restarts=True), "a")
    assert [request for _, request in fake.log if request in ("round", "restart")] == [
        *("restart", "round", "round"),
        *("restart", "round", "round"),
    ]


@pytest.mark.parametrize("request_name, timed", [("prepare", 0), ("round", 1), ("peak_memory", 3)])
def test_one_that_fails_is_reported_and_the_others_go_on(request_name, timed, fake):
    fake.failing = {("b", request_name): timed}
    result, printed = run_fakes(Schedule(3), "a", "b", "c")
    assert [timing.contestant.variant for timing in result.timings] == ["a", "c"]
    assert all(timing.seconds == (1, 2, 3) for timing in result.timings)
    assert result.failures == {Contestant("JAX", "chansel", "b"): "out of luck"}
    assert "JAX chansel b could not run: out of luck" in printed
    # At once, for its memory, not in the end with the others; and only then.
    assert sorted(v for v, request in fake.log if request == "close") == ["a", "b", "c"]
    assert fake.log.index(("b", "close")) < fake.log.index(("c", "peak_memory"))
