"""The studies that `experiments.study` runs, by name."""

from experiments.studies import data, overfit, rank, underfit, width
from experiments.studies.study import Study

STUDIES: dict[str, Study] = {
    "overfit": overfit.STUDY,
    "underfit": underfit.STUDY,
    "rank": rank.STUDY,
    "width": width.STUDY,
    "data": data.STUDY,
}
