"""What a measurement of scaling comes to: tables, a picture and a page."""

import dataclasses
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from experiments.parallelism.allreduce import Link, efficiency, messages
from experiments.reporting.tables import table

KINDS = ("weak", "strong")
PREDICTED = (8, 16, 32, 64, 128, 256, 512, 1024)
COLOURS = ("tab:blue", "tab:orange")

Table = tuple[list[str], list[list[str]]]  # headings and rows


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


@dataclasses.dataclass(frozen=True)
class Measured:
    """All that is reported.

    Attributes:
        model: the network.
        machine: its devices.
        batch_size: images a step, of each device or of all together.
        rounds: that the figures are medians of.
        steps: of each round.
        points: one device first, of each convolution.
        link: between the devices at hand.
        grouped: whether these send the arrays of an all-reduce as one message.
        assumed: the link between the devices of the prediction.
    """

    model: str
    machine: str
    batch_size: int
    rounds: int
    steps: int
    points: Sequence[Point]
    link: Link
    grouped: bool
    assumed: Link

    def by_conv(self) -> dict[str, dict[int, Point]]:
        """The points of each convolution by number of devices."""
        found: dict[str, dict[int, Point]] = {}
        for point in self.points:
            found.setdefault(point.conv, {})[point.devices] = point
        return found

    def expected(self, conv: str, devices: int, kind: str) -> float:
        """The efficiency that the paper model expects of the devices at hand."""
        points = self.by_conv()[conv]
        share = of_one(points, points[devices].apart, devices)
        seconds = self.batch_size / points[1].weak / share
        sizes = messages(points[devices].sizes, self.grouped)
        return share * efficiency(seconds, sizes, devices, self.link, kind == "weak")

    def predicted(self, conv: str, devices: int, kind: str) -> float | None:
        """What it predicts of more devices, over the assumed link; they take nothing from others.

        None where there is no image for each of them.
        """
        if kind == "strong" and devices > self.batch_size:
            return None
        points = self.by_conv()[conv]
        seconds = self.batch_size / points[1].weak
        sizes = messages(points[max(points)].sizes, grouped=True)
        return efficiency(seconds, sizes, devices, self.assumed, kind == "weak")


def of_one(points: Mapping[int, Point], speed: float, devices: int) -> float:
    """The efficiency: the share of `devices` times the speed of one."""
    return speed / points[1].weak / devices


def tables(measured: Measured) -> dict[str, Table]:
    """What was measured, and what is predicted."""
    return {
        "images/s": measured_table(measured),
        "predicted efficiency": predicted_table(measured),
    }


def measured_table(measured: Measured) -> Table:
    """What was measured, with what the model expects of the measured link beside it."""
    headings = ["", "devices", "apart", "eff."]
    for kind in KINDS:
        headings += [kind, "eff.", "model"]
    rows = []
    for conv, points in measured.by_conv().items():
        for count, point in points.items():
            row = [conv, str(count), f"{point.apart:,.0f}"]
            row.append(f"{of_one(points, point.apart, count):.2f}")
            for kind in KINDS:
                speed = getattr(point, kind)
                row += [f"{speed:,.0f}", f"{of_one(points, speed, count):.2f}"]
                row.append(f"{measured.expected(conv, count, kind):.2f}")
            rows.append(row)
    return headings, rows


def predicted_table(measured: Measured) -> Table:
    """The model's efficiencies over many devices."""
    cases = [(conv, kind) for conv in measured.by_conv() for kind in KINDS]
    headings = ["devices", *(f"{conv}, {kind}" for conv, kind in cases)]
    rows = []
    for count in PREDICTED:
        found = (measured.predicted(conv, count, kind) for conv, kind in cases)
        rows.append([f"{count:,}", *("–" if v is None else f"{v:.3f}" for v in found)])
    return headings, rows


def draw(measured: Measured) -> Figure:
    """Efficiency against devices: measured, the model for that, and its prediction as lines."""
    picture = Figure(figsize=(9, 3.8), layout="constrained")
    grid = picture.subplots(1, 2, sharey=True)
    for axes, kind in zip(grid, KINDS, strict=True):
        for (conv, points), colour in zip(measured.by_conv().items(), COLOURS, strict=False):
            speeds = [of_one(points, getattr(point, kind), n) for n, point in points.items()]
            axes.plot(list(points), speeds, "o", color=colour, label=f"{conv}, measured")
            expected = [measured.expected(conv, n, kind) for n in points]
            axes.plot(list(points), expected, "x", color=colour, label=f"{conv}, model for these")
            counts = [2**i for i in range(11)]
            predicted = [measured.predicted(conv, n, kind) for n in counts]  # None is not drawn
            axes.plot(counts, predicted, color=colour, label=f"{conv}, prediction")
        axes.set(ylim=(0, 1.05), xlabel="devices", title=f"{kind} scaling")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("efficiency")
    grid[1].legend()
    return picture


def legend(measured: Measured) -> str:
    """What the columns are."""
    return (
        "Images a second, and eff., the efficiency: the share of as many times one device's. Weak: "
        f"{measured.batch_size} images a step on each device; strong: in all (– where that leaves "
        "a device none). Apart: as weak, but each device with a network of its own and no sums "
        "between them; where its efficiency is below 1 they take cores, memory or power from each "
        "other. Model: the efficiency that the paper model expects of the measured link."
    )


def text(measured: Measured, command: str) -> str:
    """The page, in Markdown."""
    found, link, assumed = tables(measured), measured.link, measured.assumed
    sent = []
    for conv, points in measured.by_conv().items():
        sizes = points[max(points)].sizes
        arrays, kilobytes = sum(map(len, sizes)), sum(map(sum, sizes)) / 1e3
        sent.append(f"{conv} {kilobytes:,.1f} kB, {arrays} arrays in {len(sizes)} all-reduces")
    return f"""\
{measured.machine}; medians of {measured.rounds} rounds of {measured.steps} steps.

{table(*found["images/s"])}

{legend(measured)}

A step sends: {"; ".join(sent)}.

The model (its formula is in `experiments/parallelism/allreduce.py`) adds what these take to the \
step of the devices apart. In the table above it is that of the link measured here, \
{link.bandwidth / 1e9:.3g} GB/s and {link.latency * 1e6:,.0f} µs, on CPUs with a message for each \
array. For more devices as fast as one of these that take nothing from each other, with \
{assumed.bandwidth / 1e9:g} GB/s, {assumed.latency * 1e6:g} µs and a message for each all-reduce, \
it predicts these efficiencies:

{table(*found["predicted efficiency"])}

![Efficiency against devices](efficiency.png)

```bash
{command}
```
"""
