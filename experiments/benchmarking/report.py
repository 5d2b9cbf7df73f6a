"""The results as tables: on the terminal, and in Markdown to be pasted."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from experiments.benchmarking.cases import LayerShape
from experiments.reporting.machine import BUSY_LIMIT
from experiments.reporting.tables import print_table, table

Figures = Mapping[str, Any]
Table = tuple[str, list[str], list[list[str]]]  # title, headings and rows

UNITS = {
    "step": "a training step",
    "forward": "a forward pass",
    "layer": "a layer",
    "epoch": "an epoch",
}
DTYPES = {
    "float32": "float32 (TF32 off)",
    "tf32": "float32 (TF32 on)",
    "bfloat16": "bfloat16 (float32 parameters)",
}


def _share(contestant: Figures) -> float:
    return max(contestant["of_product_ceiling"], contestant["of_copy_ceiling"])


# What is told of each layer, by what it is called.
LAYER_FIGURES: Mapping[str, Callable[[Figures], float]] = {
    "ms": lambda contestant: contestant["seconds"]["median"] * 1e3,
    "GMAC/s": lambda contestant: contestant["multiply_adds_per_second"] / 1e9,
    "% of ceiling": lambda contestant: 100 * _share(contestant),
}


def print_report(results: Figures, console: Console) -> None:
    """Prints every table."""
    for line in [headline(results), *context(results)]:
        console.print(line)
    for title, headings, rows in tables(results):
        console.print()
        print_table(headings, rows, console, title)
    for line in failures(results):
        console.print(line)


def markdown(results: Figures) -> str:
    """All of the report: what, tables, machine, command."""
    parts = [f"**{headline(results)}**"]
    shown = tables(results)
    if results["what"] == "layer":
        shown += [_case_table(case) for case in results["cases"]]
    parts += [f"{title}:\n\n{table(*cells)}" for title, *cells in shown]
    if found := failures(results):
        parts.append("\n".join(f"- {line}" for line in found))
    parts.append("\n".join(f"- {line}" for line in context(results)))
    parts.append(f"```bash\n{results['command']}\n```")
    return "\n\n".join(parts) + "\n"


def headline(results: Figures) -> str:
    """What was timed."""
    case = results["cases"][0]
    layer = " of its own" if results["what"] == "layer" else ""
    images = f"batches of {case['batch_size']}"
    if results["what"] != "layer":
        images += f" images of {case['image_size']} × {case['image_size']}"
    return f"{results['model']}, {UNITS[results['what']]}{layer}, {images}"


def context(results: Figures) -> list[str]:
    """Machine, versions and what the columns mean, a line each."""
    machine, versions = results["machine"], results["versions"]
    threads = f"{machine['threads']} cores"
    if machine["platform"] == "cpu" and machine["cpu_devices"] > 1:
        threads += f", JAX on {machine['cpu_devices']} virtual devices"
    names = ("python", "jax", "flax", "torch")
    ceilings = results["ceilings"]
    products = ", ".join(
        f"{rate / 1e9:,.0f} GMAC/s of matrix products in {dtype}"
        for dtype, rate in ceilings["multiply_adds_per_second"].items()
    )
    lines = [
        f"{machine['device']}, {threads}; "
        + ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
        + f"; {results['date'][:10]}",
        f"Median (5th–95th percentile) of {_rounds(results)} in which all contestants take turns; "
        "ratios are taken round by round",
        f"Ceilings measured here: {products}, {ceilings['bytes_per_second'] / 1e9:,.0f} GB/s "
        "copied; of ceiling: of the one that is used more",
        "GMAC/s (10⁹ multiply-adds) and GB/s are counted from shapes: channel selection as its "
        "two parts however computed, each layer's input and output once a product",
    ]
    if results["what"] != "layer":
        took = {c["name"]: c["took"] for case in results["cases"] for c in case["contestants"]}
        lines += [f"{name} took {lowerings}" for name, lowerings in took.items() if lowerings]
    if machine["platform"] == "gpu":
        lines.append("MB: the peak on the device; JAX's includes its choice of kernels at start")
    if results["what"] == "epoch":
        loaders = machine["loader_workers"]
        where = f"{loaders} processes" if loaders else "the same process"
        lines.append(
            "JAX's images lie on the device and are augmented in the step, PyTorch's by a loader "
            f"in {where}"
        )
    busy = machine["busy_before"]
    if busy is not None and busy > BUSY_LIMIT:
        lines.append(f"Something else kept the cores {100 * busy:.0f} % busy beforehand")
    return lines


def failures(results: Figures) -> list[str]:
    """A line for each contestant that could not run, whatever the number of cases."""
    found = {}
    for case in results["cases"]:
        for failure in case["could_not_run"]:
            line = f"{failure['name']} could not run: {failure['reason']}"
            found.setdefault(line, []).append(case["title"])
    every = len(results["cases"])
    return [
        line + (f" ({'; '.join(titles)})" if len(titles) < every else "")
        for line, titles in found.items()
    ]


def tables(results: Figures) -> list[Table]:
    """Every table of the results."""
    if results["what"] == "layer":
        return _layer_tables(results)
    found = []
    for case in results["cases"]:
        found.append(_case_table(case))
        if results["what"] == "epoch":
            found.append(_run_table(case, results["epochs"]))
        if case["ratios"]:
            found.append(_ratio_table(case))
    return found


def _case_table(case: Figures) -> Table:
    unit, scale = unit_of(case["contestants"])
    headings = ["", unit, "images/s", "GMAC/s", "GB/s", "of ceiling", "compile", "MB"]
    rows = []
    for each in case["contestants"]:
        compiled = each["compile_seconds"]
        rows.append(
            [
                each["name"],
                _spread(each["seconds"], scale),
                f"{each['images_per_second']:,.0f}",
                f"{each['multiply_adds_per_second'] / 1e9:,.1f}",
                f"{each['bytes_per_second'] / 1e9:,.1f}",
                f"{100 * _share(each):.0f} % {each['bound']}",
                "–" if compiled is None else f"{compiled:.1f} s",
                f"{each['peak_memory_bytes'] / 1e6:,.0f}",
            ]
        )
    title = f"{UNITS[case['what']].capitalize()} in {DTYPES[case['dtype']]}"
    return case["title"] if case["what"] == "layer" else title, headings, rows


def _run_table(case: Figures, epochs: int) -> Table:
    rows = []
    for each in case["contestants"]:
        seconds, mean, std = (each["epoch"][name] for name in ("run_seconds", "mean", "std"))
        deviation = "" if std is None else f" ± {std:.2g}"
        rows.append([each["name"], *map(three_digits, seconds), three_digits(mean) + deviation])
    runs = max((len(row) - 2 for row in rows), default=0)
    headings = ["run", *(str(run + 1) for run in range(runs)), "s an epoch"]
    return f"Seconds of {epochs} epochs in {DTYPES[case['dtype']]}", headings, rows


def _ratio_table(case: Figures) -> Table:
    rows = [
        [f"{ratio['numerator']} / {ratio['denominator']}", _spread(ratio, 1)]
        for ratio in case["ratios"]
    ]
    return f"Ratios of time in {DTYPES[case['dtype']]}", ["", "ratio"], rows


def _layer_tables(results: Figures) -> list[Table]:
    groups: dict[tuple[str, str], list[Figures]] = {}
    for case in results["cases"]:
        passes = "forward + backward" if case["backward"] else "forward"
        groups.setdefault((passes, DTYPES[case["dtype"]]), []).append(case)
    found = []
    for (passes, dtype), cases in groups.items():
        headings = ["", *(str(LayerShape(**case["layer"])) for case in cases)]
        for title, figure in LAYER_FIGURES.items():
            columns = [{c["name"]: figure(c) for c in case["contestants"]} for case in cases]
            found.append((f"{title} {passes}, {dtype}", headings, _matrix(columns)))
        took = [{c["name"]: c["took"] for c in case["contestants"] if c["took"]} for case in cases]
        if any(took):
            found.append((f"Lowerings that auto takes, {passes}, {dtype}", headings, _matrix(took)))
        ratios = [{ratio["name"]: ratio["median"] for ratio in case["ratios"]} for case in cases]
        if any(ratios):
            found.append((f"Ratios of time, {passes}, {dtype}", headings, _matrix(ratios)))
    return found


def _matrix(columns: Sequence[Mapping[str, float | str]]) -> list[list[str]]:
    names = sorted({name for column in columns for name in column})
    return [[name, *(_cell(column.get(name, "–")) for column in columns)] for name in names]


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else three_digits(value)


def _spread(figures: Figures, scale: float) -> str:
    median, p5, p95 = (figures[name] * scale for name in ("median", "p5", "p95"))
    return f"{three_digits(median)} ({three_digits(p5)}–{three_digits(p95)})"


def three_digits(value: float) -> str:
    """At least three digits, and no exponent."""
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{decimals}f}"


def unit_of(contestants: Sequence[Figures]) -> tuple[str, float]:
    """The unit of their times, and how many of it are a second."""
    fastest = min((each["seconds"]["median"] for each in contestants), default=0)
    return ("s", 1.0) if fastest >= 0.5 else ("ms", 1e3)


def _rounds(results: Figures) -> str:
    if results["what"] == "epoch":
        return f"{results['runs']} runs of {results['epochs']} epochs"
    return f"{results['rounds']} rounds"
