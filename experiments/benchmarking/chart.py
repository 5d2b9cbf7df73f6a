"""The results as a chart of bars."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.benchmarking.cases import conv_and_width
from experiments.benchmarking.report import DTYPES, headline, three_digits, unit_of

# By framework and convolution: channel selection is the darker of each pair.
COLOURS = {
    ("JAX", "chansel"): "#1f5fa8",
    ("JAX", "subkernel"): "#8fb8e8",
    ("PyTorch", "chansel"): "#c8511b",
    ("PyTorch", "subkernel"): "#f2b08a",
}
# In medians of all bars; what is longer is cut.
LONGEST_BAR = 3.0
MARGIN = 1.12  # for the number behind the longest bar

BAR_INCHES, PANEL_INCHES, WIDTH_INCHES = 0.27, 0.75, 8.0


def draw(results: Mapping[str, Any]) -> Figure:
    """A panel for each case, a bar for each contestant; of a layer, the backward pass on the right.

    Args:
        results: as in `results.json`.
    """
    passes = [[c for c in results["cases"] if c["backward"] == b] for b in (False, True)]
    columns = [[(case, _shown(case)) for case in cases] for cases in passes if cases]
    every = [bars for column in columns for _, bars in column]
    rows, most = len(columns[0]), max(map(len, every))
    figure = Figure(
        figsize=(
            WIDTH_INCHES * (1 + len(columns)) / 2,
            rows * (PANEL_INCHES + BAR_INCHES * most) + 1.0,
        ),
        layout="constrained",
    )
    grid = figure.subplots(rows, len(columns), squeeze=False)
    unit, scale = unit_of([bar for bars in every for bar in bars])
    for panels, column in zip(grid.T, columns, strict=True):
        for axes, (case, bars) in zip(panels, column, strict=True):
            draw_bars(axes, bars, scale)
            title = case["title"] if case["what"] == "layer" else DTYPES[case["dtype"]]
            axes.set_title(title, fontsize=9, loc="left")
        panels[-1].set_xlabel(f"{unit}, median and 5th to 95th percentile")
    figure.suptitle(f"{headline(results)}\n{results['machine']['device']}", fontsize=11)
    present = {_kind(bar) for bars in every for bar in bars}
    handles = [
        Patch(color=c, label=" ".join(kind)) for kind, c in COLOURS.items() if kind in present
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_bars(axes: Axes, bars: Sequence[Mapping[str, Any]], scale: float) -> None:
    """A bar for each of `bars`, with its number, in seconds times `scale`."""
    longest = _longest(bars)
    limit = scale * MARGIN * longest
    for place, bar in enumerate(bars):
        median, p5, p95 = (bar["seconds"][name] * scale for name in ("median", "p5", "p95"))
        cut = bar["seconds"]["p95"] > longest
        axes.barh(
            place,
            limit if cut else median,
            color=COLOURS[_kind(bar)],
            xerr=None if cut else [[median - p5], [p95 - median]],
            error_kw={"ecolor": "0.25", "capsize": 2, "elinewidth": 1},
        )
        axes.annotate(
            f"{three_digits(median)} ▸" if cut else three_digits(median),
            (limit if cut else p95, place),
            xytext=(-5 if cut else 5, 0),
            textcoords="offset points",
            ha="right" if cut else "left",
            va="center",
            color="white" if cut and "chansel" in _kind(bar) else "black",
            fontsize=8,
        )
    axes.set_yticks(range(len(bars)), [bar["name"] for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, limit)
    axes.spines[["top", "right"]].set_visible(False)


def _kind(bar: Mapping[str, Any]) -> tuple[str, str]:
    conv, _ = conv_and_width(bar["conv"])
    return bar["framework"], conv


def _longest(bars: Sequence[Mapping[str, Any]]) -> float:
    """The most seconds that are shown in full: bars many times as long would leave no room."""
    typical = statistics.median([bar["seconds"]["median"] for bar in bars] or [1.0])
    short = [bar["seconds"] for bar in bars if bar["seconds"]["median"] <= LONGEST_BAR * typical]
    return max((seconds["p95"] for seconds in short), default=1.0)


def _shown(case: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All contestants; of many small panels' ones in PyTorch only the fastest of a convolution."""
    if case["what"] != "layer":
        return case["contestants"]
    # The fastest come first.
    torch = [each for each in case["contestants"] if each["framework"] == "PyTorch"]
    fastest = list({each["conv"]: each for each in reversed(torch)}.values())
    return [e for e in case["contestants"] if e["framework"] == "JAX" or e in fastest]
