"""Training steps over some of the devices of all processes, and what connects these, timed."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh
from rich.console import Console

from chansel_jax.networks.resnet import CONVS, ResNetConfig
from chansel_jax.training import devices
from chansel_jax.training.processes import gathered
from experiments.cli.console import tracked
from experiments.cli.errors import CommandError
from experiments.parallelism.allreduce import Link, all_reduces
from experiments.training.noise import training_on_noise

Key = TypeVar("Key", bound=Hashable)
Run = Callable[[int], None]  # that many times, and waits for the end

WARM_UP = 3
# An all-reduce is repeated in one program, so that to start this counts for little.
REPEATS = 32
SMALL, LARGE = 256, 4 * 2**20  # bytes

# The first device's training is the same apart as alone.
_training = functools.cache(training_on_noise)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        conv: the network's convolution.
        devices: how many take part.
        images: of a step over all of them.
        apart: whether each trains a network of its own, on its share of the images; else they train
            one together.
    """

    conv: str
    devices: int
    images: int
    apart: bool = False


def prepare(preset: ResNetConfig, case: Case) -> tuple[Run, list[list[int]]]:
    """The part of this process in a case, and the step's all-reduces, as `all_reduces` has them."""
    config = dataclasses.replace(preset, conv=CONVS[case.conv])
    chosen = jax.devices()[: case.devices]
    groups = [[device] for device in chosen] if case.apart else [chosen]
    here = [mesh for mesh in map(devices.data_mesh, groups) if mesh.local_devices]
    trainings = [_training(config, case.images // len(groups), mesh) for mesh in here]

    def run(steps: int) -> None:
        states = []
        for _ in range(steps):
            states = [take_step() for take_step, _ in trainings]
        jax.block_until_ready(states)

    return run, all_reduces(trainings[0][1]) if trainings else []


def time_in_turn(
    runs: Mapping[Key, Run], *, rounds: int, steps: int, console: Console
) -> dict[Key, float]:
    """The seconds that one of `steps` takes, in the slowest process: medians over `rounds`.

    In each round every run is timed once. All processes must call this alike.
    """
    for run in runs.values():
        _slowest(run, WARM_UP)
    seconds: dict[Key, list[float]] = {key: [] for key in runs}
    for _ in tracked(range(rounds), "rounds", console):
        for key, run in runs.items():
            seconds[key].append(_slowest(run, steps) / steps)
    return {key: statistics.median(values) for key, values in seconds.items()}


def _slowest(run: Run, steps: int) -> float:
    """Seconds; no process begins what comes next before all have ended."""
    start = time.perf_counter()
    run(steps)
    return float(gathered(time.perf_counter() - start).max())


def measured_link(count: int, *, rounds: int, console: Console) -> Link:
    """What connects the first `count` devices, by the paper model from all-reduces of two sizes.

    Raises:
        CommandError: if the larger ones take no longer.
    """
    mesh = devices.data_mesh(jax.devices()[:count])
    runs = {size: _all_reduce_run(size, mesh) for size in (SMALL, LARGE)}
    seconds = time_in_turn(runs, rounds=rounds, steps=1, console=console)
    small, large = (seconds[size] / REPEATS for size in (SMALL, LARGE))
    if large <= small:
        raise CommandError(
            f"the link cannot be measured: an all-reduce of {LARGE} bytes takes {large:.2g} s, of "
            f"{SMALL} bytes {small:.2g} s; is the machine busy? More --rounds may help"
        )
    sent = 2 * (count - 1) / count * (LARGE - SMALL)
    return Link(
        bandwidth=sent / (large - small),
        latency=small / (2 * math.ceil(math.log2(count))),
    )


def _all_reduce_run(size: int, mesh: Mesh) -> Run:
    """This process's part in `REPEATS` all-reduces of `size` bytes, each of the one before."""
    if not mesh.local_devices:
        return lambda times: None
    sharding = devices.batch_sharding(mesh)
    shape = (mesh.size * size // 4,)
    here = np.zeros(len(mesh.local_devices) * size // 4, np.float32)
    array = jax.make_array_from_process_local_data(sharding, here, shape)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=sharding.spec, out_specs=sharding.spec, check_vma=False
    )
    def sums(array):
        return lax.fori_loop(0, REPEATS, lambda _, x: lax.psum(x, "data"), array)

    compiled = sums.lower(array).compile()

    def run(times: int) -> None:
        for _ in range(times):
            compiled(array).block_until_ready()

    return run
