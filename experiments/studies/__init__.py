"""The studies that `experiments.study` runs, by name."""

from experiments.studies import (
    cost,
    data,
    factors,
    length,
    optimizers,
    overfit,
    rank,
    underfit,
    width,
)
from experiments.studies.study import Study

STUDIES: dict[str, Study] = {
    "overfit": overfit.STUDY,
    "underfit": underfit.STUDY,
    "optimizers": optimizers.STUDY,
    "factors": factors.STUDY,
    "length": length.STUDY,
    "cost": cost.STUDY,
    "rank": rank.STUDY,
    "width": width.STUDY,
    "data": data.STUDY,
}
