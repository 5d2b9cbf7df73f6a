"""Answers an open question with a table of trainings.

    python -m experiments.study overfit

Every row is a run of experiments.train, from each seed; the same command, typed again, goes on
where it stopped.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from chansel_jax.records import write_json
from experiments import report
from experiments.benchmarking import machine
from experiments.command_line import CommandError, make_output, run, typed
from experiments.evaluate import recorded_scores
from experiments.settings import DataSettings, checked_seeds
from experiments.studies import STUDIES
from experiments.studies.study import Study
from experiments.sweep import Outcome, run_all


@dataclasses.dataclass(frozen=True)
class Settings:
    """Runs a study: a small table of trainings, with a figure."""

    name: tyro.conf.Positional[Literal["overfit", "rank", "width", "data"]]
    """overfit: what keeps channel selection from fitting; rank: 1 to 9, beside the dense network;
    width: 16 to 44, beside dense networks of equal cost; data: both convolutions on CIFAR-10 with
    BSConv's recipe (--dataset=cifar10 is the default there)."""
    data: DataSettings = DataSettings(dataset="dog_cat_bird")
    epochs: int | None = None
    """Of each training; by default the study's full length."""
    seeds: tuple[int, ...] = (0,)
    """Each row is trained from every one."""
    only: str = ""
    """Only the rows whose label contains this."""
    output: Path | None = None
    """Folder of the runs and of the report; by default runs/study-NAME."""

    def __post_init__(self):
        if self.epochs is not None and self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be at least 1")
        checked_seeds(self.seeds)


def main(settings: Settings) -> None:
    """Runs the study, and prints how it goes."""
    study(settings, Console(highlight=False, soft_wrap=True))


def study(settings: Settings, console: Console) -> list[Outcome]:
    """Trains what is not trained yet and writes the report; returns what came out.

    Raises:
        CommandError: if no row is chosen, the data are wrong, or a training fails.
    """
    chosen = STUDIES[settings.name]
    data, epochs = settings.data, settings.epochs or chosen.epochs
    if data.dataset == "dog_cat_bird":
        data = dataclasses.replace(data, dataset=chosen.dataset)
    every = chosen.entries(data, epochs)
    entries = {label: row for label, row in every.items() if settings.only in label}
    if not entries:
        raise CommandError(f"only={settings.only} is part of none of: {'; '.join(every)}")
    output = settings.output or Path("runs", f"study-{settings.name}")
    make_output(output)
    outcomes = run_all(entries, settings.seeds, output / "runs", console)
    if chosen.plain_train_scores:
        console.print("\nplain training images:")
        outcomes = [with_plain_train_scores(o, data.data_dir, console) for o in outcomes]
    command = typed("study", settings)
    write_json(
        output / "results.json",
        {
            "command": command,
            "versions": machine.versions(),
            "rows": {o.label: [run.summary for run in o.runs] for o in outcomes},
        },
    )
    rows = table(outcomes, chosen)
    report.write(
        output,
        chosen.question,
        text(outcomes, settings, chosen, rows, command),
        {"figure": chosen.draw(outcomes)},
    )
    console.print()
    console.print(report.terminal_table(*rows))
    console.print(f"written to {output}", markup=False)
    return outcomes


def with_plain_train_scores(outcome: Outcome, data_dir: Path | None, console: Console) -> Outcome:
    """`outcome` with train loss and accuracy of the last checkpoints, on plain images."""
    runs = []
    for trained in outcome.runs:
        found = recorded_scores(trained.workdir, "train", "last", data_dir, console)
        plain = {"plain_train_loss": found["loss"], "plain_train_accuracy": found["accuracy"]}
        runs.append(dataclasses.replace(trained, summary={**trained.summary, **plain}))
    return dataclasses.replace(outcome, runs=runs)


def table(outcomes: Sequence[Outcome], chosen: Study) -> tuple[list[str], list[list[str]]]:
    """Headings and rows."""
    columns = {
        "parameters": ("parameters", ","),
        "multiply-adds": ("multiply_adds", ","),
        "epochs": ("epochs", ""),
        "train loss": ("final_train_loss", ".3f"),
        "validation loss": ("final_val_loss", ".3f"),
        "accuracy": ("final_val_accuracy", ".2%"),
        "lowest loss": ("best_val_loss", ".3f"),
        "highest accuracy": ("best_val_accuracy", ".2%"),
    }
    if chosen.plain_train_scores:
        columns["train loss"] = ("plain_train_loss", ".4f")
        columns["train accuracy"] = ("plain_train_accuracy", ".2%")
    rows = []
    for outcome in outcomes:
        first = outcome.runs[0].summary
        rows.append(
            [outcome.label]
            + [
                format(first[name], form)
                if isinstance(first[name], int)
                else outcome.spread(name, form)
                for name, form in columns.values()
            ]
        )
    for label, parameters, accuracy in chosen.published:
        cells = {"parameters": parameters, "accuracy": accuracy}
        rows.append([f"{label} (published)", *(cells.get(name, "") for name in columns)])
    return ["", *columns], rows


def text(
    outcomes: Sequence[Outcome],
    settings: Settings,
    chosen: Study,
    rows: tuple[list[str], list[list[str]]],
    command: str,
) -> str:
    """The report."""
    images = outcomes[0].runs[0].summary["images"]
    most = max(max(outcome.values("epochs")) for outcome in outcomes)
    epochs = settings.epochs or chosen.epochs
    short = f", of {chosen.epochs} at full length" if epochs != chosen.epochs else ""
    seeds = ", ".join(map(str, settings.seeds))
    train = (
        "Train loss and accuracy are those of the plain training images after the last epoch"
        if chosen.plain_train_scores
        else "The train loss is that of the last epoch's steps"
    )
    published = f"\n\nPublished: {chosen.published_note}." if chosen.published else ""
    return f"""\
{images["validation"]:,} images to validate, {epochs} epochs{short} \
(at most {most} where there are few images), seeds {seeds}. {train}; \
validation loss and accuracy are those after the last epoch, and the lowest and highest of all.

{report.table(*rows)}{published}

![{chosen.question}](figure.png)

```bash
{command}
```
"""


if __name__ == "__main__":
    run(main, Settings, "study")
