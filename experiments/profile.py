"""Where the time of a training step goes.

    python -m experiments.profile

traces some steps of experiments.train with `jax.profiler`, on random images, and adds up what each
kind of operation and each layer took. With --layer it traces one layer alone.
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
from experiments.benchmarking.settings import parse_shape
from experiments.benchmarking.trace import Profile, by_kind, by_layer, operations, times
from experiments.cli.command import check_output, run
from experiments.cli.console import make_console
from experiments.cli.errors import CommandError
from experiments.cli.flags import check_different, typed
from experiments.reporting import machine
from experiments.reporting.report import print_table
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
    if settings.output is not None:
        for folder in (settings.output, *(settings.output / conv for conv in settings.convs)):
            check_output(folder)
    device = jax.devices()[0]
    what = settings.layer and f"layer {parse_shape(settings.layer)}"
    console.print(
        f"{len(jax.devices())} × {device.device_kind}, jax {jax.__version__}, "
        f"{what or settings.model}, batches of {settings.batch_size}, {settings.dtype}"
    )
    if not native.available():
        console.print(f"native: {native.why_not()}")
    profiles = {}
    for conv in settings.convs:
        with tempfile.TemporaryDirectory() as folder:  # which holds no earlier trace
            profiles[conv] = profile_step(settings, conv, Path(folder))
            if settings.output is not None:
                shutil.copytree(folder, settings.output / conv, dirs_exist_ok=True)
        print_profile(conv, profiles[conv], console)
    if settings.output is not None:
        write_json(settings.output / "profile.json", as_json(settings, profiles))
        console.print(f"traces and profile.json are in {settings.output}")


def profile_step(settings: Settings, conv: str, folder: Path) -> Profile:
    """Compiles the training step, or one layer's two passes, then times and traces it."""
    mesh = devices.data_mesh()
    devices.check_batch_size(settings.batch_size, mesh)
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
    return Profile(untraced, milliseconds, op_names, layers, took)


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
                "layers": {name: passes for name, *passes in by_layer(profile)},
                "took": profile.took,
            }
            for conv, profile in profiles.items()
        },
    }


def print_profile(conv: str, profile: Profile, console: Console) -> None:
    """What took how long, by kind of operation and by layer, then the slowest operations."""
    took = "; ".join(f"{kind} {', '.join(taken)}" for kind, taken in profile.took.items())
    console.print(f"\n{conv}: {profile.untraced:.2f} ms a step; the lowerings are {took}")
    console.print("what runs side by side on several threads counts on each of them\n")
    rows = [(kind, str(count), f"{ms:.2f}") for kind, count, ms in by_kind(profile)]
    print_table(("kind", "operations", "ms"), rows, console)
    if profile.layers:
        rows = [(name, *(f"{ms:.2f}" for ms in passes)) for name, *passes in by_layer(profile)]
        console.print()
        print_table(("layer", "forward ms", "backward ms"), rows, console)
    slowest = sorted(profile.milliseconds.items(), key=lambda item: -item[1])[:SLOWEST]
    rows = [(f"{name}: {profile.op_names[name]}", f"{ms:.2f}") for name, ms in slowest]
    console.print()
    print_table(("the slowest operations, with what each is in Python", "ms"), rows, console)


if __name__ == "__main__":
    run(main, Settings, "profile")
