"""How training gets faster with more devices.

    python -m experiments.scaling

times training steps of both convolutions over 1, 2, 4, … of the devices at hand, and works out from
the bytes that a step sends how it would go on to 1,024.
"""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track

from chansel_jax import training
from chansel_jax.optimizer import OptimizerSettings, make_optimizer, make_schedule
from chansel_jax.records import write_json
from chansel_jax.resnet import CONVS, IMAGE_SIZES, PRESETS
from experiments import report
from experiments.allreduce import Link, all_reduces, efficiency
from experiments.benchmarking import machine
from experiments.command_line import CommandError, make_output, run, typed

CONV_NAMES = ("chansel", "subkernel")
KINDS = ("weak", "strong")
PREDICTED = (8, 16, 32, 64, 128, 256, 512, 1024)
WARM_UP_STEPS = 3

Table = tuple[list[str], list[list[str]]]  # headings and rows


@dataclasses.dataclass(frozen=True)
class Settings:
    """Images a second over more and more devices, measured and predicted."""

    devices: tuple[int, ...] = ()
    """How many; by default 1, 2, 4, … as there are. On a CPU they are virtual ones, by default as
    many as cores."""
    model: Literal["resnet14", "resnet18"] = "resnet14"
    """The network; images of 32 × 32 for the first, of 224 × 224 for the second."""
    batch_size: int = 128
    """Images a step: of each device (weak scaling), and of all together (strong scaling)."""
    rounds: int = 7
    """Each times every case once, in turn; the figures are medians."""
    steps: int = 5
    """Of a case in a round."""
    bandwidth: float = 50.0
    """GB/s that a device sends and receives, for the prediction (400 Gb/s InfiniBand: 50)."""
    latency: float = 5.0
    """Microseconds of a message, likewise."""
    output: Path = Path("runs/scaling")
    """Folder of the report."""

    def __post_init__(self):
        for name in ("batch_size", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("bandwidth", "latency"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for count in self.devices:
            if count < 1 or self.batch_size % count:
                raise ValueError(
                    f"devices={','.join(map(str, self.devices))}: batch_size={self.batch_size} "
                    f"must divide by {count}"
                )


@dataclasses.dataclass(frozen=True)
class Point:
    """A convolution's training over so many devices.

    Attributes:
        conv: the convolution.
        devices: how many.
        weak: images a second with the batch on each device.
        strong: with the batch divided between them.
        sizes: bytes of each all-reduce of a step.
    """

    conv: str
    devices: int
    weak: float
    strong: float
    sizes: tuple[int, ...]


def main(settings: Settings) -> None:
    """Measures, predicts and reports."""
    # The threads of virtual devices wait for each other in a sum; some must be left to compute.
    os.environ.setdefault("PJRT_NPROC", "16")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        wanted = max(settings.devices, default=len(machine.usable_cores()))
        jax.config.update("jax_num_cpu_devices", wanted)
    scale(settings, Console(highlight=False, soft_wrap=True))


def scale(settings: Settings, console: Console) -> list[Point]:
    """Measures over every number of devices, and writes the report.

    Raises:
        CommandError: if there are fewer devices, or the folder cannot be written.
    """
    counts = device_counts(settings)
    make_output(settings.output)
    console.print(device_names(), markup=False)
    points = measure(settings, counts, console)
    tables = {
        "measured": measured(points, settings),
        "predicted": predicted(points, settings),
    }
    command = typed("scaling", settings)
    write_json(
        settings.output / "results.json",
        {
            "command": command,
            "machine": device_names(),
            "versions": machine.versions(),
            "points": [dataclasses.asdict(point) for point in points],
        },
    )
    report.write(
        settings.output,
        f"Scaling of {settings.model}",
        text(points, settings, tables, command),
        {"efficiency": draw(points, settings)},
    )
    for name, table in tables.items():
        console.print(f"\n{name}")
        console.print(report.terminal_table(*table))
    console.print(f"written to {settings.output}", markup=False)
    return points


def device_counts(settings: Settings) -> Sequence[int]:
    """1 first, with which all others are compared.

    Raises:
        CommandError: if there are fewer devices than asked for.
    """
    there = jax.device_count()
    powers = [2**i for i in range(there.bit_length()) if settings.batch_size % 2**i == 0]
    counts = sorted({1, *(settings.devices or powers)})
    if counts[-1] > there:
        raise CommandError(f"devices={counts[-1]} must be at most the {there} that there are")
    if counts == [1]:
        raise CommandError("devices=1: what several send each other takes two at least")
    return counts


def device_names() -> str:
    """All devices; on a CPU also how many cores these share."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} × {devices[0].device_kind}"
    cores = len(machine.usable_cores())
    return f"{len(devices)} virtual devices on {cores} cores of {machine.cpu_name()}"


def measure(settings: Settings, counts: Sequence[int], console: Console) -> list[Point]:
    """Times every case in turn, round by round."""
    cases, sizes = {}, {}
    for conv in CONV_NAMES:
        for count in counts:
            for batch_size in {settings.batch_size * count, settings.batch_size}:
                key = (conv, count, batch_size)
                take_steps, sizes[key] = prepare(settings, *key)
                take_steps(WARM_UP_STEPS)
                cases[key] = take_steps
    seconds: dict[tuple, list[float]] = {key: [] for key in cases}
    for _ in track(
        range(settings.rounds),
        description="rounds",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ):
        for key, take_steps in cases.items():
            seconds[key].append(take_steps(settings.steps))
    step = {key: statistics.median(values) for key, values in seconds.items()}
    return [
        Point(
            conv,
            count,
            weak=settings.batch_size * count / step[conv, count, settings.batch_size * count],
            strong=settings.batch_size / step[conv, count, settings.batch_size],
            sizes=tuple(sizes[conv, count, settings.batch_size]),
        )
        for conv in CONV_NAMES
        for count in counts
    ]


def prepare(
    settings: Settings, conv: str, count: int, batch_size: int
) -> tuple[Callable[[int], float], list[int]]:
    """A function that takes steps and returns the seconds of one, and the step's all-reduces."""
    mesh = Mesh(np.array(jax.devices()[:count]), ("data",), axis_types=(AxisType.Auto,))
    network = PRESETS[settings.model](CONVS[conv], rngs=nnx.Rngs(0))
    defaults = OptimizerSettings()
    optimizer = make_optimizer(defaults, make_schedule(defaults, epochs=1, steps_per_epoch=1000))
    state = training.init_state(network, optimizer, 0, mesh)
    totals = training.init_totals(mesh)
    rng, size = np.random.default_rng(0), IMAGE_SIZES[settings.model]
    images = rng.integers(256, size=(batch_size, size, size, 3), dtype=np.uint8)
    labels = rng.integers(network.config.num_classes, size=batch_size, dtype=np.int32)
    batch = jax.device_put(training.Batch(images, labels), training.batch_sharding(mesh))
    mean_std = training.replicate((np.full(3, 128, np.float32), np.full(3, 64, np.float32)), mesh)
    step = training.make_batch_step(
        network, optimizer, mesh=mesh, augmentation=training.Augmentation()
    )
    compiled = step.lower(state, totals, batch, *mean_std).compile()

    def take_steps(steps: int) -> float:
        nonlocal state, totals
        start = time.perf_counter()
        for _ in range(steps):
            state, totals = compiled(state, totals, batch, *mean_std)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / steps

    return take_steps, all_reduces(compiled.as_text())


def of_conv(points: Sequence[Point], conv: str) -> dict[int, Point]:
    """By number of devices."""
    return {point.devices: point for point in points if point.conv == conv}


def model_efficiency(
    points: Mapping[int, Point], devices: int, settings: Settings, weak: bool
) -> float:
    """The paper model's, from the step of one device and the messages of several."""
    if devices == 1:
        return 1.0
    link = Link(settings.bandwidth * 1e9, settings.latency * 1e-6)
    seconds = settings.batch_size / points[1].weak
    return efficiency(seconds, points[max(points)].sizes, devices, link, weak)


def measured(points: Sequence[Point], settings: Settings) -> Table:
    """What was measured, with the model beside it."""
    headings = ["", "devices", "weak, images/s", "efficiency", "model"]
    headings += ["strong, images/s", "efficiency", "model"]
    rows = []
    for conv in CONV_NAMES:
        found = of_conv(points, conv)
        for count, point in found.items():
            row = [conv, str(count)]
            for kind in KINDS:
                speed, of_one = getattr(point, kind), getattr(found[1], kind)
                modelled = model_efficiency(found, count, settings, kind == "weak")
                row += [f"{speed:,.0f}", f"{speed / of_one / count:.2f}", f"{modelled:.2f}"]
            rows.append(row)
    return headings, rows


def predicted(points: Sequence[Point], settings: Settings) -> Table:
    """The model's efficiencies over many devices."""
    headings = ["devices", *(f"{conv}, {kind}" for conv in CONV_NAMES for kind in KINDS)]
    rows = []
    for count in PREDICTED:
        row = [f"{count:,}"]
        for conv in CONV_NAMES:
            for kind in KINDS:
                possible = kind == "weak" or count <= settings.batch_size
                found = model_efficiency(of_conv(points, conv), count, settings, kind == "weak")
                row.append(f"{found:.3f}" if possible else "–")
        rows.append(row)
    return headings, rows


def draw(points: Sequence[Point], settings: Settings) -> Figure:
    """Efficiency against devices: measured as dots, the model as lines."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(grid, KINDS, strict=True):
        for conv, colour in zip(CONV_NAMES, ("tab:blue", "tab:orange"), strict=True):
            found = of_conv(points, conv)
            of_one = getattr(found[1], kind)
            shares = [getattr(p, kind) / of_one / count for count, p in found.items()]
            axes.plot(list(found), shares, "o", color=colour, label=f"{conv}, measured")
            counts = [2**i for i in range(11) if kind == "weak" or 2**i <= settings.batch_size]
            modelled = [model_efficiency(found, n, settings, kind == "weak") for n in counts]
            axes.plot(counts, modelled, color=colour, label=f"{conv}, model")
        axes.set(xscale="log", ylim=(0, 1.05), xlabel="devices", title=f"{kind} scaling")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("efficiency")
    grid[0].legend()
    return figure


def text(
    points: Sequence[Point],
    settings: Settings,
    tables: Mapping[str, Table],
    command: str,
) -> str:
    """The report."""
    sent = "; ".join(f"{conv} {sizes_in_words(of_conv(points, conv))}" for conv in CONV_NAMES)
    shared = (
        " Virtual devices share the cores: beyond their number the efficiency must fall as one over"
        " the devices, and one device alone may already use several cores."
        if jax.devices()[0].platform == "cpu"
        else ""
    )
    return f"""\
{device_names()}; batches of {settings.batch_size}, on each device (weak) or in all (strong); \
medians of {settings.rounds} rounds of {settings.steps} steps.{shared}

{report.table(*tables["measured"])}

A step sends: {sent}.

The model (its formula is in `experiments/allreduce.py`), from the step of one device, \
{settings.bandwidth:g} GB/s and {settings.latency:g} µs:

{report.table(*tables["predicted"])}

![Efficiency against devices](efficiency.png)

```bash
{command}
```
"""


def sizes_in_words(points: Mapping[int, Point]) -> str:
    """How much a step over several devices sends, and in how many messages."""
    sizes = points[max(points)].sizes
    return f"{sum(sizes) / 1e3:,.1f} kB in {len(sizes)} all-reduces"


if __name__ == "__main__":
    run(main, Settings, "scaling")
