"""Width against rank, and both against dense networks of equal cost."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from chansel_jax.counting import count_network
from chansel_jax.networks.resnet import CONVS, PRESETS
from experiments.studies.drawing import DENSE, HIGHER, SELECTION, draw_costs
from experiments.studies.study import Study
from experiments.studies.sweep import Outcome, best_recipe, entries
from experiments.training.settings import DataSettings, Settings

WIDTHS = (16, 24, 32, 44)
RANKS = (2, 3, 4)
DENSE_WIDTHS = range(4, 21)


def settings_of(data: DataSettings, epochs: int) -> Mapping[str, Settings]:
    """Channel selection of every width and rank, and dense networks that cost as much."""
    base = best_recipe(data, epochs)
    names = [f"chansel-w{width}" for width in WIDTHS] + [f"chansel-r{rank}" for rank in RANKS]
    return entries([*names, *(f"subkernel-w{width}" for width in dense_widths())], base)


def dense_widths() -> list[int]:
    """Of the dense networks nearest in parameters, and in multiply-adds, to each width's."""
    found = set()
    for width in WIDTHS:
        for kind, wanted in enumerate(costs("chansel", width)):
            found.add(min(DENSE_WIDTHS, key=lambda w: abs(costs("subkernel", w)[kind] - wanted)))
    return sorted(found)


@functools.cache
def costs(conv: str, width: int) -> tuple[int, int]:
    """Parameters of ResNet-14 with three classes, and its multiply-adds for an image."""
    config = dataclasses.replace(PRESETS["resnet14"], conv=CONVS[conv], width=width)
    rows = count_network(config, config.image_size)
    return sum(row.parameters for row in rows), sum(row.multiply_adds for row in rows)


def draw(outcomes: Sequence[Outcome]) -> Figure:
    """Accuracy against parameters and against multiply-adds."""
    names = {
        "dense": (DENSE, "subkernel"),
        "channel selection, wider": (SELECTION, "chansel-w"),
        "channel selection, of higher rank": (HIGHER, ("chansel-r", "chansel-w16")),
    }
    groups = {
        name: (colour, [o for o in outcomes if o.label.startswith(of)])
        for name, (colour, of) in names.items()
    }
    costs = {"parameters": "parameters", "multiply_adds": "multiply-adds an image"}
    return draw_costs(groups, costs)


STUDY = Study(
    question="Width or rank: which buys more accuracy for a parameter, and for a multiply-add?",
    epochs=100,
    entries=settings_of,
    draw=draw,
    scored=("validation",),
    reference="chansel-w16",
)
