"""What a study is, and how its means are drawn."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from experiments.studies.sweep import Origin, Outcome
from experiments.training.settings import DataSettings, Settings


@dataclasses.dataclass(frozen=True)
class Study:
    """A small table of settings that answers a question.

    Attributes:
        question: which.
        epochs: of each training, at full length.
        entries: settings of each row, by label, for images and a number of epochs.
        draw: a picture of what came out.
        dataset: its images where none are asked for.
        scored: splits, where there are such images, on which the last checkpoint is measured:
            plain images, without dropout.
        tuned_by: the figure by which the best learning rate of each network is chosen, from the
            first seed, if its entries are those of `at_rates`; further seeds are trained at this
            rate only.
        origins: of rows that need another row's network, by label.
        folds: whether a seed is the number of a fold too, so that no two seeds validate on the same
            image.
        reference: the label of the row, without its learning rate where that is tuned, with which
            the others are compared, image by image.
        references: another one for some of the rows, by their labels likewise.
        published: rows to compare with: label, parameters, accuracy.
        published_classes: how many classes those are of; beside others they are not shown.
        published_note: where they are from.
        note: a sentence for the report on trainings of a number of epochs, if there is more to say.
    """

    question: str
    epochs: int
    entries: Callable[[DataSettings, int], Mapping[str, Settings]]
    draw: Callable[[Sequence[Outcome]], Figure]
    dataset: str = "dog_cat_bird"
    scored: Sequence[str] = ()
    tuned_by: str | None = None
    origins: Mapping[str, Origin] = dataclasses.field(default_factory=dict)
    folds: bool = False
    reference: str | None = None
    references: Mapping[str, str] = dataclasses.field(default_factory=dict)
    published: Sequence[tuple[str, str, str]] = ()
    published_classes: int = 10
    published_note: str = ""
    note: Callable[[int], str] = lambda epochs: ""

    def published_beside(self, outcomes: Sequence[Outcome]) -> Sequence[tuple[str, str, str]]:
        """`published`, if it is of as many classes as these are."""
        classes = len(outcomes[0].runs[0].data["class_names"])
        return self.published if classes == self.published_classes else ()
