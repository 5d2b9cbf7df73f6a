"""How training gets faster with more devices.

    python -m experiments.scaling

times training steps of both convolutions over 1, 2, 4, … of the devices at hand, and works out from
the bytes that a step sends how it would go on to 1,024.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from chansel_jax.files import write_json
from chansel_jax.networks.resnet import PRESETS, Model
from experiments.cli.command import check_output, run
from experiments.cli.console import make_console
from experiments.cli.errors import CommandError
from experiments.cli.flags import check_different, typed
from experiments.cluster import coordination
from experiments.cluster.joining import ClusterSettings, join
from experiments.parallelism import report as scaling_report
from experiments.parallelism.allreduce import Link
from experiments.parallelism.report import Measured, Point
from experiments.parallelism.timing import Case, measured_link, prepare, time_in_turn
from experiments.reporting import machine, report
from experiments.reporting.tables import print_table
from experiments.training.settings import Conv


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measures and predicts the images a second over more and more devices."""

    devices: tuple[int, ...] = ()
    """The steps are timed with each of these numbers of devices; by default 1, 2, 4, … as there
    are. Those of a single process on a CPU are virtual ones, at most as many as cores."""
    model: Model = "resnet14"
    """This is the network; it takes images of the size that it was made for."""
    convs: tuple[Conv, ...] = ("chansel", "subkernel")
    """Channel selection, the ordinary dense convolution, or both are timed."""
    blocks: tuple[int, ...] = ()
    """The stages have these numbers of residual blocks; by default they are the model's own."""
    batch_size: int = 128
    """A step takes this many images on each device (weak scaling), and on all together (strong
    scaling)."""
    rounds: int = 7
    """In each of so many rounds every case is timed once, in turn; the figures are medians."""
    steps: int = 5
    """A case takes this many steps in a round."""
    bandwidth: float = 50.0
    """The prediction has a device send and receive so many GB/s (400 Gb/s InfiniBand does 50)."""
    latency: float = 5.0
    """The prediction has a message take so many microseconds."""
    output: Path = Path("runs/scaling")
    """The report is written to this folder."""
    cluster: ClusterSettings = ClusterSettings()

    def __post_init__(self):
        for name in ("batch_size", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_different("convs", self.convs, "convolutions")
        for name in ("bandwidth", "latency"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0, and finite")
        for name in ("blocks", "devices"):
            for count in getattr(self, name):
                if count < 1:
                    raise ValueError(f"{name}={count} must be at least 1")
        for count in self.devices:
            if self.batch_size % count:
                raise ValueError(
                    f"batch_size={self.batch_size} must be divisible by devices={count}"
                )


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
    scale(settings, make_console())


def scale(settings: Settings, console: Console) -> Measured:
    """Measures over every number of devices, and writes the report.

    Raises:
        CommandError: if there are fewer devices, the folder cannot be written, or the processes
            have other settings.
    """
    shared = dataclasses.asdict(settings)
    del shared["output"], shared["cluster"]  # in which the processes may differ
    coordination.check_equal("settings", shared)
    counts = device_counts(settings)
    coordination.first_alone(lambda: check_output(settings.output, "scaling"))
    console.print(device_names())
    measured = measure(settings, counts, console)
    coordination.first_alone(lambda: write(measured, settings, console))
    return measured


def write(measured: Measured, settings: Settings, console: Console) -> None:
    """Writes the results and the report, and prints its tables."""
    command = what_to_type(settings)
    settings.output.mkdir(parents=True, exist_ok=True)
    write_json(
        settings.output / "results.json",
        {"command": command, "versions": machine.versions(), **dataclasses.asdict(measured)},
    )
    report.write(
        settings.output,
        f"Scaling of {measured.model}",
        scaling_report.text(measured, command),
        {"efficiency": scaling_report.draw(measured)},
    )
    for name, table in scaling_report.tables(measured).items():
        console.print(f"\n{name}")
        print_table(*table, console)
    console.print(f"\n{scaling_report.legend(measured)}")
    console.print(f"the results are written to {settings.output}")


def what_to_type(settings: Settings) -> str:
    """The command, of process 0 if there are several."""
    command = typed("scaling", dataclasses.replace(settings, cluster=ClusterSettings()))
    cores, processes = machine.usable_cores(), jax.process_count()
    pinned = len(cores) < os.cpu_count()
    if pinned:
        command = f"taskset -c {','.join(map(str, cores))} {command}"
    command = machine.with_variables(command)
    if processes > 1:
        command += f" --coordinator=HOST:PORT --num-processes={processes} --process-id=0"
        command += f"  # in the others 1 to {processes - 1}" if processes > 2 else "  # and 1"
        command += ", on other cores" if pinned else ""
    return command


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
    two = "it takes two to send each other anything"
    if counts == [1] and settings.devices:
        raise CommandError(f"devices=1: {two}")
    if there == 1:
        raise CommandError(f"there is one device only, and {two}")
    if counts == [1]:
        raise CommandError(f"batch_size={settings.batch_size} must be divisible by 2: {two}")
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


def measure(settings: Settings, counts: Sequence[int], console: Console) -> Measured:
    """Times the link, and every case in turn, round by round."""
    images = settings.batch_size
    link = measured_link(counts[-1], rounds=settings.rounds, console=console)
    cases = {
        (conv, count): {
            "weak": Case(conv, count, images * count),
            "strong": Case(conv, count, images),
            "apart": Case(conv, count, images * count, apart=count > 1),
        }
        for conv in settings.convs
        for count in counts
    }
    preset = PRESETS[settings.model]
    preset = dataclasses.replace(preset, blocks=settings.blocks or preset.blocks)
    of_all = dict.fromkeys(case for kinds in cases.values() for case in kinds.values())
    prepared = {case: prepare(preset, case) for case in of_all}
    runs = {case: run for case, (run, _) in prepared.items()}
    seconds = time_in_turn(runs, rounds=settings.rounds, steps=settings.steps, console=console)
    points = []
    for (conv, count), kinds in cases.items():
        speeds = {kind: case.images / seconds[case] for kind, case in kinds.items()}
        points.append(Point(conv, count, **speeds, sizes=prepared[kinds["strong"]][1]))
    return Measured(
        settings.model,
        device_names(),
        images,
        settings.rounds,
        settings.steps,
        points,
        link,
        grouped=jax.devices()[0].platform != "cpu",  # as NCCL does, and Gloo does not
        assumed=Link(settings.bandwidth * 1e9, settings.latency * 1e-6),
    )


if __name__ == "__main__":
    run(main, Settings, "scaling")
