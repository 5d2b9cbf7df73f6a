"""The results as a chart of bars."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

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


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: a panel for each case, a bar for each contestant."""
    panels = [(case, _shown(case)) for case in results["cases"]]
    columns = 2 if results["what"] == "layer" else 1
    panels = _in_rows(panels) if columns == 2 else panels
    rows = -(-len(panels) // columns)
    most = max(len(bars) for _, bars in panels)
    figure = Figure(
        figsize=(
            WIDTH_INCHES * (1.5 if columns == 2 else 1),
            rows * (PANEL_INCHES + BAR_INCHES * most) + 1.0,
        ),
        layout="constrained",
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    unit, scale = unit_of([bar for _, bars in panels for bar in bars])
    for axes, (case, bars) in zip(grid, panels, strict=False):
        draw_bars(axes, bars, scale)
        axes.set_title(_title(case), fontsize=9, loc="left")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(panels) - columns) :]:
        axes.set_xlabel(f"{unit}, median and 5th to 95th percentile")
    figure.suptitle(f"{headline(results)}\n{results['machine']['device']}", fontsize=11)
    figure.legend(handles=_legend(panels), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120, format="png")


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
            color=COLOURS[bar["framework"], bar["conv"]],
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
            color="white" if cut and bar["conv"] == "chansel" else "black",
            fontsize=8,
        )
    axes.set_yticks(range(len(bars)), [bar["name"] for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, limit)
    axes.spines[["top", "right"]].set_visible(False)


def _longest(bars: Sequence[Mapping[str, Any]]) -> float:
    """The most seconds that are shown in full: bars many times as long would leave no room."""
    typical = statistics.median([bar["seconds"]["median"] for bar in bars] or [1.0])
    short = [bar["seconds"] for bar in bars if bar["seconds"]["median"] <= LONGEST_BAR * typical]
    return max((seconds["p95"] for seconds in short), default=1.0)


def _shown(case: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All contestants; of many small panels' ones in PyTorch only the fastest of a convolution."""
    if case["what"] != "layer":
        return case["contestants"]
    shown, seen = [], set()
    # The fastest come first.
    for each in case["contestants"]:
        if each["framework"] == "JAX" or each["conv"] not in seen:
            shown.append(each)
        if each["framework"] == "PyTorch":
            seen.add(each["conv"])
    return shown


def _in_rows(panels: Sequence[tuple]) -> list[tuple]:
    """Forward of a layer on the left, with backward on the right."""
    forward = [panel for panel in panels if not panel[0]["backward"]]
    backward = [panel for panel in panels if panel[0]["backward"]]
    return [panel for pair in zip(forward, backward, strict=True) for panel in pair]


def _title(case: Mapping[str, Any]) -> str:
    return case["title"] if case["what"] == "layer" else DTYPES[case["dtype"]]


def _legend(panels: Sequence[tuple]) -> list[Patch]:
    present = {(bar["framework"], bar["conv"]) for _, bars in panels for bar in bars}
    return [
        Patch(color=colour, label=" ".join(pair))
        for pair, colour in COLOURS.items()
        if pair in present
    ]
