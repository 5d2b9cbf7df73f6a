"""Where the time of a training step goes.

    python -m experiments.profile

traces some steps of experiments.train with `jax.profiler`, on random images, and adds up what each
kind of operation took.
"""

import collections
import contextlib
import dataclasses
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Column, Table

from chansel_jax.files import write_json
from chansel_jax.networks.resnet import CONVS, PRESETS, Model
from chansel_jax.ops import native
from chansel_jax.training import devices
from experiments.cli.command import make_output, run
from experiments.cli.console import make_console
from experiments.cli.flags import typed
from experiments.reporting import machine
from experiments.training.noise import training_on_noise
from experiments.training.settings import Conv

WARM_UP_STEPS = 20  # until the heap has stopped growing
SLOWEST = 8  # operations that are listed one by one


@dataclasses.dataclass(frozen=True)
class Settings:
    """Shows where the time of a training step goes, by kind of operation."""

    model: Model = "resnet14"
    """This is the network; it takes images of the size that it was made for."""
    convs: tuple[Conv, ...] = ("chansel", "subkernel")
    """Channel selection, the ordinary dense convolution, or both are profiled."""
    batch_size: int = 128
    """A step takes this many images."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The step computes in this dtype; its parameters are float32."""
    steps: int = 5
    """This many steps are timed, and as many are traced."""
    output: Path | None = None
    """The traces, which TensorBoard and Perfetto show, and profile.json, which holds the tables,
    are written to this folder; by default nothing is kept."""

    def __post_init__(self):
        for name in ("batch_size", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.convs:
            raise ValueError("convs= must name at least one convolution")


@dataclasses.dataclass(frozen=True)
class Profile:
    """What the steps took.

    Attributes:
        untraced: milliseconds of a step that is not traced.
        milliseconds: of a step, by operation of the compiled program; what runs side by side on
            several threads counts on each.
        op_names: what each operation was in Python, as XLA keeps it.
    """

    untraced: float
    milliseconds: Mapping[str, float]
    op_names: Mapping[str, str]


def main(settings: Settings) -> None:
    """Profiles every convolution's network and prints a table of each."""
    console = make_console()
    if settings.output is not None:
        make_output(settings.output)
    device = jax.devices()[0]
    console.print(
        f"{len(jax.devices())} × {device.device_kind}, jax {jax.__version__}, "
        f"{settings.model}, batches of {settings.batch_size}, {settings.dtype}"
    )
    if not native.available():
        console.print(f"native: {native.why_not()}")
    profiles = {}
    for conv in settings.convs:
        with contextlib.ExitStack() as stack:
            if settings.output is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            else:
                folder = settings.output / conv
            profiles[conv] = profile_step(settings, conv, folder)
        print_profile(conv, profiles[conv], console)
    if settings.output is not None:
        write_json(settings.output / "profile.json", as_json(settings, profiles))
        console.print(f"traces and profile.json are in {settings.output}")


def profile_step(settings: Settings, conv: str, folder: Path) -> Profile:
    """Compiles the training step, then times and traces it."""
    mesh = devices.data_mesh()
    devices.check_batch_size(settings.batch_size, mesh)
    dtype = getattr(jnp, settings.dtype)
    config = dataclasses.replace(PRESETS[settings.model], conv=CONVS[conv], dtype=dtype)
    take_step, compiled = training_on_noise(config, settings.batch_size, mesh)

    def take_steps(count: int, one_at_a_time: bool = False) -> float:
        start = time.perf_counter()
        for _ in range(count):
            state = take_step()
            if one_at_a_time:
                jax.block_until_ready(state)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / count * 1e3

    take_steps(WARM_UP_STEPS)
    untraced = take_steps(settings.steps)
    with jax.profiler.trace(folder):
        # Of steps in flight, one would be charged with waiting for the other.
        take_steps(settings.steps, one_at_a_time=True)
    op_names = operations(compiled)
    return Profile(untraced, times(folder, op_names, settings.steps), op_names)


def operations(compiled: str) -> dict[str, str]:
    """The operations of a compiled program's entry, with what each was in Python ("" if nothing).

    What loops and calls contain is left out: it is part of their time.
    """
    entry = compiled[compiled.index("\nENTRY ") :]
    instruction = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = (?:.*op_name="([^"]*)")?', re.MULTILINE)
    return {name: op_name or "" for name, op_name in instruction.findall(entry)}


def times(folder: Path, names: Iterable[str], steps: int) -> dict[str, float]:
    """Milliseconds a step of the operations `names` in the trace that `folder` holds."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    known, total = set(names), collections.Counter()
    trace = jax.profiler.ProfileData.from_file(str(newest))
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name in known and not event.name.startswith("end: "):
                    total[name] += event.duration_ns
    return {name: nanoseconds / steps / 1e6 for name, nanoseconds in total.items()}


def kind_of(op_name: str) -> str:
    """The kind of an operation, from its name in Python as XLA keeps it."""
    primitive = op_name.rsplit("/", 1)[-1]
    for scope in ("augmentation", "optimizer"):
        if scope in op_name:
            return scope
    if primitive in ("conv_general_dilated", "dot_general", "ffi_call"):
        return "convolutions, matrix products"
    if primitive in ("", "transpose", "copy"):
        return "transposes, copies"
    if primitive.startswith("reduce"):
        return "sums (BatchNorm)"
    return "elementwise (BatchNorm, ReLU, …)"


def by_kind(profile: Profile) -> list[tuple[str, int, float]]:
    """Each kind, how many operations it has and their milliseconds, the most first."""
    kinds = collections.defaultdict(list)
    for name, milliseconds in profile.milliseconds.items():
        kinds[kind_of(profile.op_names[name])].append(milliseconds)
    rows = ((kind, len(found), sum(found)) for kind, found in kinds.items())
    return sorted(rows, key=lambda row: -row[2])


def as_json(settings: Settings, profiles: Mapping[str, Profile]) -> dict[str, Any]:
    """The profiles of the convolutions, with what they were measured on."""
    return {
        "command": typed("profile", settings),
        "device": machine.device_name(),
        "cores": len(machine.usable_cores()),
        "versions": machine.versions(),
        "milliseconds": {
            conv: {
                "step": profile.untraced,
                "kinds": {kind: found for kind, _, found in by_kind(profile)},
            }
            for conv, profile in profiles.items()
        },
    }


def print_profile(conv: str, profile: Profile, console: Console) -> None:
    """A row a kind, then the slowest operations."""
    print_rows(
        f"{conv}: {profile.untraced:.1f} ms a step; what runs side by side counts each",
        ("kind", "operations", "ms"),
        by_kind(profile),
        console,
    )
    slowest = sorted(profile.milliseconds.items(), key=lambda item: -item[1])[:SLOWEST]
    rows = [(name, profile.op_names[name], ms) for name, ms in slowest]
    print_rows("the slowest operations", ("operation", "in Python", "ms"), rows, console)


def print_rows(title: str, headings: tuple, rows: Iterable[tuple], console: Console) -> None:
    """A table whose last column is a number."""
    *names, number = headings
    table = Table(*names, Column(number, justify="right"), title=title, title_justify="left")
    for *cells, milliseconds in rows:
        table.add_row(*map(str, cells), f"{milliseconds:.2f}")
    console.print(table)


if __name__ == "__main__":
    run(main, Settings, "profile")
