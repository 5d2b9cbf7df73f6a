"""How training gets faster with more devices.

    python -m experiments.scaling

times training steps of both convolutions over 1, 2, 4, … of the devices at hand, and works out from
the bytes that a step sends how it would go on to 1,024.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import jax
from matplotlib.figure import Figure
from rich.console import Console

from chansel_jax.records import write_json
from experiments import cluster, report
from experiments.allreduce import Link, efficiency, messages
from experiments.benchmarking import machine
from experiments.benchmarking.parallel import Case, measured_link, prepare, time_in_turn
from experiments.command_line import CommandError, make_output, run, typed
from experiments.joining import ClusterSettings, join

CONV_NAMES = ("chansel", "subkernel")
KINDS = ("weak", "strong")
PREDICTED = (8, 16, 32, 64, 128, 256, 512, 1024)

Table = tuple[list[str], list[list[str]]]  # headings and rows


@dataclasses.dataclass(frozen=True)
class Settings:
    """Images a second over more and more devices, measured and predicted."""

    devices: tuple[int, ...] = ()
    """How many; by default 1, 2, 4, … as there are. Those of a single process on a CPU are virtual
    ones, at most as many as cores."""
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
    cluster: ClusterSettings = ClusterSettings()

    def __post_init__(self):
        for name in ("batch_size", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("bandwidth", "latency"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for count in self.devices:
            if count < 1:
                raise ValueError(f"devices={count} must be at least 1")
            if self.batch_size % count:
                raise ValueError(
                    f"batch_size={self.batch_size} must be divisible by devices={count}"
                )


@dataclasses.dataclass(frozen=True)
class Point:
    """A convolution's training over so many devices, in images a second of all together.

    Attributes:
        conv: the convolution.
        devices: how many.
        weak: with the batch on each device.
        strong: with the batch divided between them.
        apart: with the batch on each device and no sums between them, each training a network of
            its own: what they take from each other where they share cores, memory or power.
        sizes: bytes of each array of each all-reduce of a step.
    """

    conv: str
    devices: int
    weak: float
    strong: float
    apart: float
    sizes: list[list[int]]


def main(settings: Settings) -> None:
    """Measures, predicts and reports."""
    # The threads of virtual devices wait for each other in a sum; some must be left to compute.
    os.environ.setdefault("PJRT_NPROC", "16")
    join(settings.cluster)
    virtual = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not (virtual or jax.distributed.is_initialized()):
        cores = len(machine.usable_cores())
        wanted = min(max(settings.devices, default=cores), cores)
        jax.config.update("jax_num_cpu_devices", wanted)
    with cluster.ended_together():
        scale(settings, cluster.console())


def scale(settings: Settings, console: Console) -> list[Point]:
    """Measures over every number of devices, and writes the report.

    Raises:
        CommandError: if there are fewer devices, the folder cannot be written, or the processes
            have other settings.
    """
    cluster.check_equal("settings", equal_in_all_processes(settings))
    counts = device_counts(settings)
    cluster.first_alone(lambda: make_output(settings.output))
    console.print(device_names(), markup=False)
    link = measured_link(counts[-1], rounds=settings.rounds, console=console)
    points = measure(settings, counts, console)
    cluster.first_alone(lambda: write(points, link, settings, console))
    return points


def equal_in_all_processes(settings: Settings) -> dict:
    """What the processes must agree on."""
    own = ("output", "cluster")
    return {name: value for name, value in dataclasses.asdict(settings).items() if name not in own}


def write(points: Sequence[Point], link: Link, settings: Settings, console: Console) -> None:
    """Writes the results and the report, and prints its tables."""
    tables = {
        "images/s": measured_table(points, link, settings),
        "predicted efficiency": predicted_table(points, settings),
    }
    command = what_to_type(settings)
    write_json(
        settings.output / "results.json",
        {
            "command": command,
            "machine": device_names(),
            "versions": machine.versions(),
            "link": dataclasses.asdict(link),
            "points": [dataclasses.asdict(point) for point in points],
        },
    )
    report.write(
        settings.output,
        f"Scaling of {settings.model}",
        text(points, link, settings, tables, command),
        {"efficiency": draw(points, link, settings)},
    )
    for name, table in tables.items():
        console.print(f"\n{name}")
        console.print(report.terminal_table(*table))
    console.print(f"\n{legend(settings)}")
    console.print(f"written to {settings.output}", markup=False)


def what_to_type(settings: Settings) -> str:
    """The command, of process 0 if there are several."""
    command = typed("scaling", dataclasses.replace(settings, cluster=ClusterSettings()))
    cores, processes = machine.usable_cores(), jax.process_count()
    if len(cores) < os.cpu_count():
        command = f"taskset -c {','.join(map(str, cores))} {command}"
    if processes > 1:
        command += f" --coordinator=HOST:PORT --num-processes={processes} --process-id=0"
        command += f"  # in the others 1 to {processes - 1}" if processes > 2 else "  # and 1"
        command += ", on other cores" if len(cores) < os.cpu_count() else ""
    return command


def legend(settings: Settings) -> str:
    """What the columns are."""
    return (
        f"Images a second, and eff., the efficiency: the share of as many times one device's. "
        f"Weak: {settings.batch_size} images a step on each device; strong: in all (– where that "
        "leaves a device none). Apart: as weak, but each device with a network of its own and no "
        "sums between them; where its efficiency is below 1 they take cores, memory or power from "
        "each other. Model: the efficiency that the paper model expects of the measured link."
    )


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
    if there == 1:
        raise CommandError("there is one device only; what several send each other takes two")
    if counts == [1]:
        raise CommandError(
            "devices=1: what several send each other takes two at least"
            if settings.devices
            else f"batch_size={settings.batch_size} must be divisible by 2, the fewest to compare"
        )
    return counts


def device_names() -> str:
    """All devices, their processes, and on a CPU how many cores a process has."""
    devices, processes = jax.devices(), jax.process_count()
    of = f" of {processes} processes" if processes > 1 else ""
    if devices[0].platform != "cpu":
        return f"{len(devices)} × {devices[0].device_kind}{of}"
    cores = len(machine.usable_cores())
    shared = f"{cores} core{'s' * (cores > 1)} {'each' if processes > 1 else 'in all'}"
    return f"{len(devices)} virtual devices{of}, {shared}, {machine.cpu_name()}"


def measure(settings: Settings, counts: Sequence[int], console: Console) -> list[Point]:
    """Times every case in turn, round by round."""
    images = settings.batch_size
    cases = [
        Case(conv, count, size, apart)
        for conv in CONV_NAMES
        for count in counts
        for size, apart in ((images * count, False), (images, False), (images * count, count > 1))
    ]
    prepared = {case: prepare(settings.model, case) for case in dict.fromkeys(cases)}
    runs = {case: run for case, (run, _) in prepared.items()}
    seconds = time_in_turn(runs, rounds=settings.rounds, steps=settings.steps, console=console)
    speed = {case: case.images / taken for case, taken in seconds.items()}
    return [
        Point(
            conv,
            count,
            weak=speed[Case(conv, count, images * count)],
            strong=speed[Case(conv, count, images)],
            apart=speed[Case(conv, count, images * count, apart=count > 1)],
            sizes=prepared[Case(conv, count, images)][1],
        )
        for conv in CONV_NAMES
        for count in counts
    ]


def of_conv(points: Sequence[Point], conv: str) -> dict[int, Point]:
    """By number of devices."""
    return {point.devices: point for point in points if point.conv == conv}


def expected_efficiency(
    points: Mapping[int, Point], devices: int, settings: Settings, link: Link, weak: bool
) -> float:
    """What the paper model expects of the devices at hand and the `link` measured between them."""
    share = points[devices].apart / points[1].weak / devices
    seconds = settings.batch_size / points[1].weak / share
    sizes = messages(points[devices].sizes, grouped=jax.devices()[0].platform != "cpu")
    return share * efficiency(seconds, sizes, devices, link, weak)


def predicted_efficiency(
    points: Mapping[int, Point], devices: int, settings: Settings, weak: bool
) -> float:
    """What it predicts of more devices that take nothing from each other, over the given link."""
    seconds = settings.batch_size / points[1].weak
    link = Link(settings.bandwidth * 1e9, settings.latency * 1e-6)
    sizes = messages(points[max(points)].sizes, grouped=True)
    return efficiency(seconds, sizes, devices, link, weak)


def measured_table(points: Sequence[Point], link: Link, settings: Settings) -> Table:
    """What was measured, with what the model expects of the measured link beside it."""
    headings = ["", "devices", "apart", "eff."]
    for kind in KINDS:
        headings += [kind, "eff.", "model"]
    rows = []
    for conv in CONV_NAMES:
        found = of_conv(points, conv)
        for count, point in found.items():
            share = point.apart / found[1].weak / count
            row = [conv, str(count), f"{point.apart:,.0f}", f"{share:.2f}"]
            for kind in KINDS:
                speed = getattr(point, kind)
                expected = expected_efficiency(found, count, settings, link, kind == "weak")
                row += [f"{speed:,.0f}", f"{speed / found[1].weak / count:.2f}", f"{expected:.2f}"]
            rows.append(row)
    return headings, rows


def predicted_table(points: Sequence[Point], settings: Settings) -> Table:
    """The model's efficiencies over many devices."""
    headings = ["devices", *(f"{conv}, {kind}" for conv in CONV_NAMES for kind in KINDS)]
    rows = []
    for count in PREDICTED:
        row = [f"{count:,}"]
        for conv in CONV_NAMES:
            for kind in KINDS:
                possible = kind == "weak" or count <= settings.batch_size
                found = of_conv(points, conv)
                predicted = predicted_efficiency(found, count, settings, kind == "weak")
                row.append(f"{predicted:.3f}" if possible else "–")
        rows.append(row)
    return headings, rows


def draw(points: Sequence[Point], link: Link, settings: Settings) -> Figure:
    """Efficiency against devices: measured, the model for that, and its prediction as lines."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(grid, KINDS, strict=True):
        weak = kind == "weak"
        for conv, colour in zip(CONV_NAMES, ("tab:blue", "tab:orange"), strict=True):
            found = of_conv(points, conv)
            speeds = [getattr(point, kind) / found[1].weak / n for n, point in found.items()]
            axes.plot(list(found), speeds, "o", color=colour, label=f"{conv}, measured")
            expected = [expected_efficiency(found, n, settings, link, weak) for n in found]
            axes.plot(list(found), expected, "x", color=colour, label=f"{conv}, model for these")
            counts = [2**i for i in range(11) if weak or 2**i <= settings.batch_size]
            predicted = [predicted_efficiency(found, n, settings, weak) for n in counts]
            axes.plot(counts, predicted, color=colour, label=f"{conv}, prediction")
        axes.set(ylim=(0, 1.05), xlabel="devices", title=f"{kind} scaling")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("efficiency")
    grid[1].legend()
    return figure


def text(
    points: Sequence[Point],
    link: Link,
    settings: Settings,
    tables: Mapping[str, Table],
    command: str,
) -> str:
    """The report."""
    sent = "; ".join(f"{conv} {sizes_in_words(of_conv(points, conv))}" for conv in CONV_NAMES)
    return f"""\
{device_names()}; medians of {settings.rounds} rounds of {settings.steps} steps.

{report.table(*tables["images/s"])}

{legend(settings)}

A step sends: {sent}.

The model (its formula is in `experiments/allreduce.py`) adds what these take to the step of the \
devices apart. In the table above it is that of the link measured here, \
{link.bandwidth / 1e9:.3g} GB/s and {link.latency * 1e6:,.0f} µs, on CPUs with a message for each \
array. For more devices as fast as one of these that take nothing from each other, with \
{settings.bandwidth:g} GB/s, {settings.latency:g} µs and a message for each all-reduce, it \
predicts these efficiencies:

{report.table(*tables["predicted efficiency"])}

![Efficiency against devices](efficiency.png)

```bash
{command}
```
"""


def sizes_in_words(points: Mapping[int, Point]) -> str:
    """How much a step over several devices sends, and in how many messages."""
    sizes = points[max(points)].sizes
    arrays = messages(sizes, grouped=False)
    return f"{sum(arrays) / 1e3:,.1f} kB, {len(arrays)} arrays in {len(sizes)} all-reduces"


if __name__ == "__main__":
    run(main, Settings, "scaling")
