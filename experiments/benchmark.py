"""Times JAX and PyTorch side by side.

    python -m experiments.benchmark --what=step

Every contestant runs in a process of its own; outputs are compared first, then all are timed in
interleaved rounds. Tables are printed and written, with a chart, to --output.
"""

import dataclasses
import datetime
import re
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from chansel_jax.files import replaced, write_json
from experiments.benchmarking import chart, plan, report, results
from experiments.benchmarking.rounds import run_case
from experiments.benchmarking.settings import Settings
from experiments.benchmarking.survey import Survey, survey
from experiments.benchmarking.work import work_of
from experiments.cli.command import check_output, run
from experiments.cli.console import make_console
from experiments.cli.errors import CommandError
from experiments.cli.flags import typed
from experiments.reporting import machine, plots


def main(settings: Settings) -> None:
    """Runs the benchmark that `settings` describe, and prints how it goes."""
    # The parent only counts and draws: a GPU is for the workers.
    jax.config.update("jax_platforms", "cpu")
    benchmark(settings, make_console())


def benchmark(settings: Settings, console: Console) -> dict[str, Any]:
    """Runs the benchmark and writes its results; returns them as they are in `results.json`.

    Raises:
        OneLineError: if settings do not fit the machine, outputs differ, or nothing could run.
    """
    if settings.output:
        check_output(settings.output, "benchmark")
    train_images = plan.load_train_images(settings)
    surveyed = survey(settings, console)
    output = settings.output or default_output(settings, surveyed)
    check_output(output, "benchmark")
    cases = run_cases(settings, surveyed, train_images, console)
    results = describe(settings, surveyed) | {"cases": cases}
    if not any(case["contestants"] for case in results["cases"]):
        raise CommandError("no contestant could run: " + "; ".join(report.failures(results)))
    write(results, output)
    report.print_report(results, console)
    console.print(f"the results are written to {output}")
    return results


def run_cases(
    settings: Settings,
    surveyed: Survey,
    train_images: plan.TrainImages | None,
    console: Console,
) -> list[dict[str, Any]]:
    """Times one case after the other.

    Raises:
        PlanError: if settings do not fit the machine.
        MismatchError: if two contestants do not compute the same.
    """
    contestants = plan.make_contestants(settings, surveyed.machine, surveyed.has_torch)
    schedule = plan.make_schedule(settings)
    found = []
    for case in plan.make_cases(settings, surveyed.machine, train_images):
        tasks = plan.make_tasks(case, contestants, surveyed.machine, train_images)
        found.append(
            results.case_figures(
                run_case(tasks, schedule, console),
                {conv: work_of(case, conv) for conv in settings.convs},
                surveyed.ceilings,
                schedule,
                plan.default_lowering("chansel"),
                train_images and len(train_images.labels) // case.batch_size,
            )
        )
    return found


def describe(settings: Settings, surveyed: Survey) -> dict[str, Any]:
    """All of the results but the cases: what was asked for, of which machine, when."""
    asked = dataclasses.asdict(settings)
    del asked["images"]["data_dir"], asked["output"]
    return {
        **asked,
        "command": machine.with_variables(typed("benchmark", settings)),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": surveyed.figures(),
        "versions": machine.versions(),
        "ceilings": dataclasses.asdict(surveyed.ceilings),
    }


def default_output(settings: Settings, surveyed: Survey) -> Path:
    """`benchmarks/WHAT-MODEL-DEVICE`."""
    device = "cpu" if surveyed.machine.platform == "cpu" else surveyed.device
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path("benchmarks", f"{settings.what}-{settings.model}-{slug}")


def write(results: dict[str, Any], output: Path) -> None:
    """Replaces the files in `output`, each at once; the numbers first."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", results)
    with replaced(output / "results.md") as partial:
        partial.write_text(report.markdown(results), encoding="utf-8")
    plots.save(chart.draw(results), output / "chart.png")


if __name__ == "__main__":
    run(main, Settings, "benchmark")
