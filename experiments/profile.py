"""Where the time of a training step goes.

    python -m experiments.profile

traces some steps of experiments.train with `jax.profiler`, on random images, and adds up what each
kind of operation and each layer took, beside the floor: how long moving its bytes would take at the
speed of a copy. With --layer it traces one layer alone.
"""

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from chansel_jax.conv import lowerings_taken
from chansel_jax.files import write_json
from chansel_jax.networks.resnet import CONVS, PRESETS, Model, ResNet
from chansel_jax.ops import native
from chansel_jax.training import devices
from experiments.benchmarking.cases import Case
from experiments.benchmarking.ceilings import CPU_EFFORT, GPU_EFFORT, numpy_copy_rate
from experiments.benchmarking.contestants.jax_side import copy_rate
from experiments.benchmarking.settings import parse_shape
from experiments.benchmarking.trace import (
    Profile,
    Spent,
    by_kind,
    by_layer,
    bytes_touched,
    operations,
    times,
)
from experiments.benchmarking.work import work_of
from experiments.cli.command import check_output, run
from experiments.cli.console import make_console
from experiments.cli.errors import CommandError
from experiments.cli.flags import check_different, typed
from experiments.reporting import machine
from experiments.reporting.tables import print_table
from experiments.training.noise import layer_on_noise, training_on_noise
from experiments.training.settings import Conv

WARM_UP_STEPS = 20  # until the heap has stopped growing
SLOWEST = 8  # operations that are listed one by one


@dataclasses.dataclass(frozen=True)
class Settings:
    """Shows where the time of a training step goes, by kind of operation and by layer."""

    model: Model = "resnet14"
    """This is the network; it takes images of the size that it was made for."""
    layer: str | None = None
    """Forward and backward pass of this one layer are profiled in place of a network's step. It is
    SIZExC_INxC_OUTxKERNELxSTRIDE as in 32x16x24x3x1, a kernel of 3 × 3 at stride 1 from 16 to 24
    channels on images of 32 × 32."""
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
        check_different("convs", self.convs, "convolutions")
        if self.layer is not None:
            parse_shape(self.layer, "layer")


def main(settings: Settings) -> None:
    """Profiles every convolution's network and prints a table of each."""
    console = make_console()
    # What the program calls its layers must be its own, where one that computes the same was kept.
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    # With this one too, JAX 0.10.2 fails where there are several devices.
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", False)
    if settings.output is not None:
        for folder in (settings.output, *(settings.output / conv for conv in settings.convs)):
            check_output(folder)
    devices.check_batch_size(settings.batch_size, devices.data_mesh())
    device = jax.devices()[0]
    what = settings.layer and f"layer {parse_shape(settings.layer)}"
    console.print(
        f"{len(jax.devices())} × {device.device_kind}, jax {jax.__version__}, "
        f"{what or settings.model}, batches of {settings.batch_size}, {settings.dtype}"
    )
    if not native.available():
        console.print(f"native: {native.why_not()}")
    rate = _copy_rate(device.platform)
    console.print(f"a copy moves {rate / 1e9:.1f} GB/s, what it reads and what it writes added up")
    profiles = {}
    for conv in settings.convs:
        with tempfile.TemporaryDirectory() as folder:  # which holds no earlier trace
            profiles[conv] = profile_step(settings, conv, Path(folder))
            if settings.output is not None:
                shutil.copytree(folder, settings.output / conv, dirs_exist_ok=True)
        print_profile(conv, profiles[conv], rate, console)
        if settings.layer is None:
            print_floor(settings, conv, profiles[conv], rate, console)
    if settings.output is not None:
        write_json(settings.output / "profile.json", as_json(settings, profiles, rate))
        console.print(f"traces and profile.json are in {settings.output}")


def profile_step(settings: Settings, conv: str, folder: Path) -> Profile:
    """Compiles the training step, or one layer's two passes, then times and traces it."""
    mesh = devices.data_mesh()
    module, layers, take_step, compiled = _compiled(settings, conv, mesh)

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
    try:
        with jax.profiler.trace(folder):
            # Of steps in flight, one would be charged with waiting for the other.
            take_steps(settings.steps, one_at_a_time=True)
    except jax.errors.JaxRuntimeError as error:  # as of a full disk
        told = str(error).splitlines()[0]
        raise CommandError(f"no trace can be written below {folder.parent}: {told}") from error
    op_names = operations(compiled)
    milliseconds = times(folder, op_names, settings.steps)
    taken = lowerings_taken(module, getattr(jnp, settings.dtype))
    took = {kind: taken[layer] for kind, layer in CONVS.items() if layer in taken}
    return Profile(untraced, milliseconds, bytes_touched(compiled), op_names, layers, took)


def _compiled(
    settings: Settings, conv: str, mesh: Mesh
) -> tuple[nnx.Module, tuple[str, ...], Callable[[], Any], str]:
    """What is profiled, the names of its layers, a function that takes a step, and its program."""
    dtype = getattr(jnp, settings.dtype)
    if settings.layer is not None:
        shape = parse_shape(settings.layer)
        sizes = (shape.in_channels, shape.out_channels, (shape.kernel_size, shape.kernel_size))
        window = {"strides": shape.stride, "padding": shape.padding}
        layer = CONVS[conv](*sizes, **window, dtype=dtype, rngs=nnx.Rngs(0))
        images = (settings.batch_size, shape.size, shape.size, shape.in_channels)
        return layer, (), *layer_on_noise(layer, images, mesh)
    config = dataclasses.replace(PRESETS[settings.model], conv=CONVS[conv], dtype=dtype)
    network = nnx.eval_shape(lambda: ResNet(config, rngs=nnx.Rngs(0)))
    layers = tuple(layer.path for layer in config.layers())
    return network, layers, *training_on_noise(config, settings.batch_size, mesh)


def _copy_rate(platform: str) -> float:
    """Bytes that the fastest copy reads and writes a second."""
    if platform == "cpu":
        return numpy_copy_rate(CPU_EFFORT, len(machine.usable_cores()))
    return copy_rate(GPU_EFFORT)


def as_json(settings: Settings, profiles: Mapping[str, Profile], rate: float) -> dict[str, Any]:
    """The profiles of the convolutions, with what they were measured on."""
    return {
        "command": machine.with_variables(typed("profile", settings)),
        "device": machine.device_name(),
        "cores": len(machine.usable_cores()),
        "versions": machine.versions(),
        "bytes_per_second": rate,
        "milliseconds": {
            conv: {
                "step": profile.untraced,
                "kinds": {kind: found.milliseconds for kind, _, found in by_kind(profile)},
                "layers": {
                    name: [each.milliseconds for each in passes]
                    for name, *passes in by_layer(profile)
                },
                "took": profile.took,
            }
            for conv, profile in profiles.items()
        },
        "bytes_touched": {
            conv: {kind: found.bytes_touched for kind, _, found in by_kind(profile)}
            for conv, profile in profiles.items()
        },
    }


def print_profile(conv: str, profile: Profile, rate: float, console: Console) -> None:
    """What took how long, by kind of operation and by layer, then the slowest operations.

    Args:
        conv: the convolution.
        profile: what its steps took.
        rate: bytes that a copy moves a second.
        console: where it is printed.
    """

    def times_of(spent: Spent) -> tuple[str, str]:
        return f"{spent.milliseconds:.2f}", f"{spent.bytes_touched / rate * 1e3:.2f}"

    took = "; ".join(f"{kind} {', '.join(taken)}" for kind, taken in profile.took.items())
    console.print(f"\n{conv}: {profile.untraced:.2f} ms a step; the lowerings are {took}")
    console.print("what runs side by side on several threads counts on each of them; the floor is")
    console.print("how long a copy takes to move an operation's operands and results once\n")
    rows = [(kind, str(count), *times_of(spent)) for kind, count, spent in by_kind(profile)]
    print_table(("kind", "operations", "ms", "floor ms"), rows, console)
    if profile.layers:
        rows = [
            (name, *times_of(forward), *times_of(backward))
            for name, forward, backward in by_layer(profile)
        ]
        console.print()
        columns = ("layer", "forward ms", "floor ms", "backward ms", "floor ms")
        print_table(columns, rows, console)
    slowest = sorted(profile.milliseconds.items(), key=lambda item: -item[1])[:SLOWEST]
    rows = [
        (f"{name}: {profile.op_names[name]}", *times_of(Spent(ms, profile.bytes_touched[name])))
        for name, ms in slowest
    ]
    console.print()
    columns = ("the slowest operations, with what each is in Python", "ms", "floor ms")
    print_table(columns, rows, console)


def print_floor(
    settings: Settings, conv: str, profile: Profile, rate: float, console: Console
) -> None:
    """The fewest bytes that a step of the network must move, and how far the step is from it."""
    config = PRESETS[settings.model]
    sizes = (settings.batch_size, config.image_size, config.num_classes)
    fewest = work_of(Case("step", settings.model, *sizes, settings.dtype), conv).bytes_moved
    floor = fewest / rate * 1e3
    console.print(
        f"\na step must move {fewest / 1e6:,.0f} MB at least, every activation written once and "
        f"read once a use: {floor:.1f} ms for a copy, {floor / profile.untraced:.0%} of the step"
    )


if __name__ == "__main__":
    run(main, Settings, "profile")
