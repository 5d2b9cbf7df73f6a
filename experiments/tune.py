"""Measures every lowering on this machine, and holds the rules of "auto" against it.

    python -m experiments.tune

times one layer, forward and backward, for a list of shapes, its depthwise part alone, the dense
convolution, and what often follows, BatchNorm with a residual and ReLU. It prints Markdown, as in
the tables of `chansel_jax/README.md`. Run it when nothing else runs; the lowerings take turns, so
that a machine that drifts hits all alike.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from chansel_jax.ops import dense, depthwise, lowerings, native, selection
from chansel_jax.ops.norm import batch_norm
from experiments.cli.command import run
from experiments.cli.console import make_console
from experiments.cli.flags import check_different
from experiments.reporting.tables import table


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measures every lowering on this machine, and holds the rules of "auto" against it."""

    batch_size: int = 128
    """A batch has this many images of 32 × 32 or smaller, or a sixteenth as many larger ones."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32",)
    """Every layer is computed in each of these."""
    rounds: int = 15
    """Each lowering is timed so many times; the median counts."""

    def __post_init__(self):
        for name in ("batch_size", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        check_different("dtypes", self.dtypes, "dtypes")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer: images of `size` × `size`, padded as PyTorch's `kernel // 2`."""

    size: int
    in_channels: int
    out_channels: int
    kernel: int = 3
    strides: int = 1
    rank: int = 1

    def __str__(self):
        text = f"{self.size}² {self.in_channels}→{self.out_channels}, {self.kernel}×{self.kernel}"
        text += f" /{self.strides}" if self.strides > 1 else ""
        return text + (f" rank {self.rank}" if self.rank > 1 else "")


# The layers of ResNet-14, some of them of higher ranks, and a few of ResNet-18.
LAYERS = (
    Shape(32, 16, 16),
    Shape(32, 16, 32, strides=2),
    Shape(32, 16, 32, kernel=1, strides=2),
    Shape(16, 32, 32),
    Shape(16, 32, 64, strides=2),
    Shape(8, 64, 64),
    Shape(32, 16, 16, rank=2),
    Shape(32, 16, 16, rank=3),
    Shape(32, 16, 32, strides=2, rank=3),
    Shape(16, 32, 32, rank=3),
    Shape(8, 64, 64, rank=4),
    Shape(8, 64, 64, rank=9),
    Shape(224, 3, 64, kernel=7, strides=2),
    Shape(56, 64, 64),
    Shape(28, 128, 128),
    Shape(14, 256, 256),
    Shape(7, 512, 512),
)


HOPELESS = 10  # a lowering that takes so many times as long as the fastest is timed once


@dataclasses.dataclass(frozen=True)
class Result:
    """The median milliseconds of each lowering for one shape, and what "auto" chooses there."""

    shape: Shape
    milliseconds: dict[str, float]
    chosen: str

    @property
    def fastest(self) -> str:
        """The lowering that took the least time."""
        return min(self.milliseconds, key=self.milliseconds.get)


def main(settings: Settings) -> None:
    """Measures as `settings` say, and prints a table of each of `TIMED`."""
    console = make_console()
    device = jax.devices()[0]
    console.print(f"{len(jax.devices())} × {device.device_kind}, jax {jax.__version__}")
    if not native.available():
        console.print(f"native: {native.why_not()}")
    for dtype in settings.dtypes:
        for title, calls_of in TIMED.items():
            results = []
            for shape in track(LAYERS, title, console=console, transient=True):
                calls, arguments, chosen = calls_of(shape, dtype, settings.batch_size)
                times = time_calls(calls, arguments, settings.rounds)
                results.append(Result(shape, times, chosen))
            title = f"{title}, {dtype}, forward + backward, ms"
            console.print(report(title, results))


# What is timed of one layer: a function of each lowering that can run here, what all of them are
# given, and the name of the one that "auto" takes.
Calls = tuple[dict[str, Callable[..., jax.Array]], tuple[jax.Array, ...], str]


def layer_calls(shape: Shape, dtype: str, batch_size: int) -> Calls:
    """Channel selection."""
    x, pointwise, kernel = operands(shape, dtype, batch_size)
    chosen = lowerings.fastest_layer(lowerings.here(), x, kernel)
    calls = _in_all(selection.channel_selection, selection.LOWERINGS, shape)
    return calls, (x, pointwise, kernel), chosen


def depthwise_calls(shape: Shape, dtype: str, batch_size: int) -> Calls:
    """Its depthwise part alone."""
    x, pointwise, kernel = operands(shape, dtype, batch_size)
    chosen = lowerings.fastest_depthwise(lowerings.here(), x)
    calls = _in_all(depthwise.depthwise_conv, depthwise.LOWERINGS, shape)
    return calls, (selection.weighted_sums(x, pointwise), kernel), chosen


def dense_calls(shape: Shape, dtype: str, batch_size: int) -> Calls:
    """The dense convolution of the same window."""
    x, pointwise, kernel = operands(shape, dtype, batch_size)
    composed = selection.composed_kernel(pointwise, kernel)
    chosen = lowerings.fastest_dense(lowerings.here(), composed)
    return _in_all(dense.dense_conv, dense.LOWERINGS, shape), (x, composed), chosen


def norm_calls(shape: Shape, dtype: str, batch_size: int) -> Calls:
    """BatchNorm of the layer's output, with a residual and ReLU."""
    x, _, kernel = operands(shape, dtype, batch_size)
    pixels, channels = -(-shape.size // shape.strides), kernel.shape[-1]
    y = jax.random.normal(jax.random.key(0), (len(x), pixels, pixels, channels), x.dtype)
    ones = jnp.ones(channels)
    calls = {name: functools.partial(_norm, name) for name in lowerings.runnable(NORMS)}
    return calls, (y, ones, ones, y), next(iter(calls))


NORMS = ("native", "lax")
TIMED = {
    "layer": layer_calls,
    "depthwise part": depthwise_calls,
    "dense convolution": dense_calls,
    "BatchNorm": norm_calls,
}


def _in_all(function: Callable, choices: tuple[str, ...], shape: Shape) -> dict[str, Callable]:
    """The function in every lowering that can run here."""
    window = {"strides": shape.strides, "padding": shape.kernel // 2}
    names = (name for name in lowerings.runnable(choices) if name != "auto")
    return {name: functools.partial(function, **window, lowering=name) for name in names}


def _norm(name: str, *operands: jax.Array) -> jax.Array:
    with lowerings.lowering("lax" if name == "lax" else "auto"):
        y, _, _ = batch_norm(*operands, relu=True)
    return y


def operands(shape: Shape, dtype: str, batch_size: int) -> list[jax.Array]:
    """Random images, pointwise and depthwise kernels."""
    rng = np.random.default_rng(0)
    images = batch_size if shape.size <= 32 else max(1, batch_size // 16)
    shapes = (
        (images, shape.size, shape.size, shape.in_channels),
        (shape.in_channels, shape.out_channels * shape.rank),
        (shape.kernel, shape.kernel, shape.rank, shape.out_channels),
    )
    return [jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes]


def time_calls(
    calls: dict[str, Callable[..., jax.Array]], arguments: tuple[jax.Array, ...], rounds: int
) -> dict[str, float]:
    """Median milliseconds of each call with all its gradients; the calls take turns."""

    def compiled(call):
        def output_and_gradients(gradient, *arguments):
            y, pull_back = jax.vjp(call, *arguments)
            return y, pull_back(gradient)

        output = jax.eval_shape(call, *arguments)
        gradient = jnp.ones(output.shape, output.dtype)
        return jax.jit(output_and_gradients).lower(gradient, *arguments).compile(), gradient

    functions = {name: compiled(call) for name, call in calls.items()}
    seconds = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, (function, gradient) in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(gradient, *arguments))
            seconds[name].append(time.perf_counter() - start)
        if round_number == 0:
            # Only a warm-up, but enough to know which will not be chosen.
            limit = HOPELESS * min(values[0] for values in seconds.values())
            functions = {name: f for name, f in functions.items() if seconds[name][0] < limit}
    return {name: statistics.median(values[1:] or values) * 1e3 for name, values in seconds.items()}


def report(title: str, results: list[Result]) -> str:
    """A row a shape, and how much longer all shapes take than in the fastest lowering of each."""
    headings = ["layer", *results[0].milliseconds, "fastest", "auto"]
    rows = []
    for result in results:
        numbers = [f"{value:.2f}" for value in result.milliseconds.values()]
        rows.append([str(result.shape), *numbers, result.fastest, result.chosen])
    fastest = sum(result.milliseconds[result.fastest] for result in results)
    chosen = sum(result.milliseconds[result.chosen] for result in results)
    agree = sum(result.chosen == result.fastest for result in results)
    return (
        f"\n{title}:\n\n{table(headings, rows)}\n\n"
        f"auto is the fastest for {agree} of {len(results)} shapes; all shapes take "
        f"{chosen / fastest:.2f} times as long as in the fastest lowering of each"
    )


if __name__ == "__main__":
    run(main, Settings, "tune")
