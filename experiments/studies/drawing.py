"""Pictures of what came out of a study, with every seed."""

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from experiments.studies.sweep import Outcome

ACCURACY = "validation accuracy, last epoch\n(bars: 95 %, for the choice of the images)"

# One meaning in all studies, and in the curves of `plots`, which begin with the dense network.
DENSE, SELECTION, WIDER, HIGHER, SMALL = "C0", "C1", "C2", "C3", "C4"
OTHERS = ("C5", "C6", "C8")  # for what is not a kind of network


def draw_seeds(
    axes: Axes,
    places: Sequence[float],
    outcomes: Sequence[Outcome],
    name: str,
    label: str,
    color: str,
) -> None:
    """A line through the means of a figure, each at its place, and a dot for every seed.

    Of an accuracy there is `image_error` too.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    line = [places[i] for i in order], [outcomes[i].mean(name) for i in order]
    errors = [image_error(outcomes[i], name) for i in order]
    axes.errorbar(*line, yerr=errors, color=color, label=label, linewidth=1.2, elinewidth=0.7)
    for place, outcome in zip(places, outcomes, strict=True):
        axes.plot([place] * len(outcome.runs), outcome.values(name), "o", color=color, alpha=0.6)


def image_error(outcome: Outcome, name: str) -> float:
    """Half of the 95 % interval of an accuracy, for the choice of the images; else 0."""
    if not name.endswith("accuracy"):
        return 0.0
    # Seeds have the same images, or each has a fold of its own.
    counts = {
        run.data["digests"]["validation"]: run.data["images"]["validation"] for run in outcome.runs
    }
    accuracy = outcome.mean(name)
    return 1.96 * math.sqrt(accuracy * (1 - accuracy) / sum(counts.values()))


def draw_costs(
    groups: Mapping[str, tuple[str, Sequence[Outcome]]], costs: Mapping[str, str]
) -> Figure:
    """Accuracy against each of `costs`, whose headings are given by figure; a line a group.

    Args:
        groups: by label, a colour and what came out.
        costs: headings, by figure.
    """
    picture = Figure(figsize=(4 + 3 * len(costs), 4.2), layout="constrained")
    grid = picture.subplots(1, len(costs), sharey=True)
    for axes, (cost, heading) in zip(grid, costs.items(), strict=True):
        for label, (colour, group) in groups.items():
            places = [outcome.mean(cost) for outcome in group]
            draw_seeds(axes, places, group, "final_val_accuracy", label, colour)
        axes.set(xscale="log", xlabel=heading)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    grid[0].set_ylabel(ACCURACY)
    grid[0].legend(fontsize=8)
    return picture


def draw_rows(outcomes: Sequence[Outcome], name: str, heading: str) -> Figure:
    """A figure of every outcome, one below the other: a dot for every seed, a bar at the mean."""
    picture = Figure(figsize=(8, 1.1 + 0.4 * len(outcomes)), layout="constrained")
    axes = picture.add_subplot()
    for place, outcome in enumerate(outcomes):
        values = outcome.values(name)
        axes.plot(values, [place] * len(values), "o", color="tab:blue", alpha=0.6)
        axes.plot(outcome.mean(name), place, "|", color="black", markersize=16)
        error = image_error(outcome, name)
        axes.errorbar(outcome.mean(name), place, xerr=error, color="black", elinewidth=0.7)
    axes.set_yticks(range(len(outcomes)), [outcome.label for outcome in outcomes])
    axes.set_ylim(len(outcomes) - 0.5, -0.5)  # the first on top
    axes.set(xlabel=heading)
    axes.grid(alpha=0.3)
    return picture
