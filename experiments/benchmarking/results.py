"""The figures of a benchmark, from the seconds of its rounds; as nested JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.benchmarking.cases import Case, conv_and_width
from experiments.benchmarking.ceilings import Ceilings
from experiments.benchmarking.rounds import CaseResult, Schedule, Timing
from experiments.benchmarking.work import Work

Figures = dict[str, Any]


def spread(values: Sequence[float]) -> Figures:
    """Median, and 5th and 95th percentile, linear between the values."""
    p5, median, p95 = np.percentile(np.asarray(values), (5, 50, 95))
    return {"median": float(median), "p5": float(p5), "p95": float(p95)}


def case_figures(
    result: CaseResult,
    works: dict[str, Work],
    ceilings: Ceilings,
    schedule: Schedule,
    default_lowering: str,
    steps_per_epoch: int | None,
) -> Figures:
    """All of one case.

    Args:
        result: the case's rounds.
        works: by convolution, of one step.
        ceilings: the machine's.
        schedule: how the rounds came about.
        default_lowering: that of JAX's channel selection.
        steps_per_epoch: where an epoch was timed.
    """
    steps = steps_per_epoch or 1
    contestants = []
    for timing in sorted(result.timings, key=lambda timing: np.median(timing.seconds)):
        figures = contestant_figures(result.case, timing, works, ceilings, steps)
        if steps_per_epoch:
            figures["epoch"] = epoch_figures(timing.seconds, schedule.runs)
        contestants.append(figures)
    return {
        "title": result.case.title,
        **dataclasses.asdict(result.case),
        "work": {conv: dataclasses.asdict(work) for conv, work in works.items()},
        "contestants": contestants,
        "ratios": ratios(result.timings, default_lowering),
        "could_not_run": [
            {"name": contestant.name, "reason": reason}
            for contestant, reason in result.failures.items()
        ],
    }


def contestant_figures(
    case: Case, timing: Timing, works: dict[str, Work], ceilings: Ceilings, steps: int
) -> Figures:
    """Time, and how far from the machine's ceilings; `steps` batches were timed as one."""
    seconds, work = spread(timing.seconds), works[timing.contestant.conv]
    batches_per_second = steps / seconds["median"]
    multiply_adds = work.multiply_adds * batches_per_second
    bytes_moved = work.bytes_moved * batches_per_second
    of_products = multiply_adds / ceilings.multiply_adds_per_second[case.dtype]
    of_copies = bytes_moved / ceilings.bytes_per_second
    return {
        "name": timing.contestant.name,
        **dataclasses.asdict(timing.contestant),
        "seconds": seconds,
        "rounds": list(timing.seconds),
        "steps_per_round": timing.steps_per_round,
        "compile_seconds": timing.compile_seconds,
        "peak_memory_bytes": timing.peak_memory,
        "images_per_second": case.batch_size * batches_per_second,
        "multiply_adds_per_second": multiply_adds,
        "of_product_ceiling": of_products,
        "bytes_per_second": bytes_moved,
        "of_copy_ceiling": of_copies,
        "bound": "memory" if of_copies > of_products else "compute",
        "tolerance_needed": timing.tolerance_needed,
        "took": timing.took,
    }


def epoch_figures(seconds: Sequence[float], runs: int) -> Figures:
    """The original's table: seconds of each run, and mean and deviation of an epoch over runs."""
    by_run = np.asarray(seconds).reshape(runs, -1)
    means = by_run.mean(axis=1)
    return {
        "run_seconds": by_run.sum(axis=1).tolist(),
        "mean": float(means.mean()),
        # Of runs, which are a sample: one of them has no deviation.
        "std": float(means.std(ddof=1)) if runs > 1 else None,
    }


def ratios(timings: Sequence[Timing], default_lowering: str) -> list[Figures]:
    """Those pairs of contestants that answer a question, round by round."""

    def fastest(framework: str, conv: str, variant: str | None = None) -> Timing | None:
        alike = [
            timing
            for timing in timings
            for contestant in [timing.contestant]
            if (contestant.framework, contestant.conv) == (framework, conv)
            and variant in (None, contestant.variant)
        ]
        return min(alike, key=lambda timing: np.median(timing.seconds), default=None)

    chansel = fastest("JAX", "chansel", default_lowering) or fastest("JAX", "chansel")
    own = chansel.contestant.name if chansel else ""
    subkernel = fastest("JAX", "subkernel")
    torch_chansel, torch_subkernel = fastest("PyTorch", "chansel"), fastest("PyTorch", "subkernel")
    of_widths = {
        conv: fastest("JAX", conv)
        for conv in dict.fromkeys(timing.contestant.conv for timing in timings)
        if conv_and_width(conv)[1]
    }
    found = {}
    for name, numerator, denominator in [
        (f"{own} / fastest JAX subkernel", chansel, subkernel),
        (f"{own} / JAX subkernel lax", chansel, fastest("JAX", "subkernel", "lax")),
        (f"{own} / fastest PyTorch chansel", chansel, torch_chansel),
        (f"{own} / fastest PyTorch subkernel", chansel, torch_subkernel),
        (f"{own} / JAX chansel grouped", chansel, fastest("JAX", "chansel", "grouped")),
        ("fastest JAX subkernel / fastest PyTorch subkernel", subkernel, torch_subkernel),
        ("PyTorch chansel / subkernel, fastest each", torch_chansel, torch_subkernel),
        *((f"fastest JAX {conv} / subkernel", each, subkernel) for conv, each in of_widths.items()),
    ]:
        if numerator and denominator and numerator is not denominator:
            both = numerator.contestant, denominator.contestant
            found.setdefault(both, {"name": name, **ratio(numerator, denominator)})
    return list(found.values())


def ratio(numerator: Timing, denominator: Timing) -> Figures:
    """How many times the seconds of `denominator` `numerator` took, round by round."""
    pairs = zip(numerator.seconds, denominator.seconds, strict=True)
    return {
        "numerator": numerator.contestant.name,
        "denominator": denominator.contestant.name,
        **spread([a / b for a, b in pairs]),
    }
