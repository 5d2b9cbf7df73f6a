"""Several networks, each trained from several seeds."""

import dataclasses
import functools
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx
from rich.console import Console

from experiments.cli.differences import differences
from experiments.cli.errors import CommandError
from experiments.training.experiment import load_data
from experiments.training.load import Records, read_config, read_records
from experiments.training.loop import DivergedError
from experiments.training.records import Row
from experiments.training.run import train_and_evaluate
from experiments.training.scores import Wanted, recorded_scores
from experiments.training.settings import DataSettings, Settings, build_network, decisive
from experiments.training.workdir import holds_run

NAME_FORMAT = "CONV[-wWIDTH][-rRANK]"


@dataclasses.dataclass(frozen=True)
class Trained(Records):
    """A finished run.

    Attributes:
        scores: by what their files are called after, as in `evaluation-SPLIT.json`.
    """

    scores: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The runs of one network, one a seed.

    Attributes:
        label: what it is called.
        runs: in the order of the seeds.
    """

    label: str
    runs: Sequence[Trained]

    def values(self, name: str) -> list[float]:
        """A figure of the summaries of all runs."""
        return [run.summary[name] for run in self.runs]

    def mean(self, name: str) -> float:
        """Its mean."""
        return statistics.fmean(self.values(name))

    def deviation(self, name: str) -> float:
        """Its standard deviation; 0 of a single run."""
        return statistics.stdev(self.values(name)) if len(self.runs) > 1 else 0.0

    def spread(self, name: str, form: str) -> str:
        """`mean ± standard deviation`, or the one value there is; `form` as in `format`."""
        mean = format(self.mean(name), form)
        return mean if len(self.runs) == 1 else f"{mean} ± {format(self.deviation(name), form)}"


def run_all(
    entries: Mapping[str, Settings],
    seeds: Sequence[int],
    folder: Path,
    console: Console,
    wanted: Sequence[Wanted] = (),
) -> tuple[list[Outcome], list[str]]:
    """Trains every entry from every seed, under `folder`; what is done already stays.

    All entries are trained from the first seed before any is from the next. A finished run is taken
    from its records, so it may come from another machine and needs no checkpoints. A training whose
    loss is not finite is left out.

    Args:
        entries: settings by label.
        seeds: in place of theirs.
        folder: of the runs, each in its own, named after label and seed.
        console: takes the progress.
        wanted: scores of each run; they join its summary, as `plain_SPLIT_loss` and
            `plain_SPLIT_accuracy`.

    Returns:
        What came out, and a line for each training whose loss was not finite.

    Raises:
        OneLineError: as `train_and_evaluate` and `recorded_scores`, or if an entry has wrong
            settings, or a run in `folder` other ones, or no loss was finite.
    """
    check_networks(entries)
    done: dict[str, list[Trained]] = {label: [] for label in entries}
    diverged: list[str] = []
    count = len(entries) * len(seeds)
    for i, seed in enumerate(seeds):
        for j, (label, settings) in enumerate(entries.items()):
            number = i * len(entries) + j + 1
            console.print(f"\n[{number}/{count}] {label}, seed {seed}", markup=False)
            workdir = folder / f"{folder_name(label)}-seed{seed}"
            given = dataclasses.replace(settings, seed=seed, workdir=workdir, resume="auto")
            try:
                if is_finished(given):
                    console.print(f"finished before: {workdir}", markup=False)
                else:
                    train_and_evaluate(given, console)
            except DivergedError as error:
                diverged.append(f"{label}, seed {seed}: {error}")
                console.print(diverged[-1], markup=False)
                continue
            scores = {
                each.name: recorded_scores(workdir, each, given.data.data_dir, console)
                for each in wanted
            }
            done[label].append(with_scores(read_records(workdir), scores))
    if not any(done.values()):
        raise CommandError("; ".join(diverged))
    return [Outcome(label, runs) for label, runs in done.items() if runs], diverged


def with_scores(records: Records, scores: Mapping[str, Mapping[str, Any]]) -> Trained:
    """A run with its scores, which join the summary."""
    plain = {
        f"plain_{name}_{figure}": found[figure]
        for name, found in scores.items()
        for figure in ("loss", "accuracy")
    }
    return Trained({**records.summary, **plain}, records.history, scores)


def left_out(diverged: Sequence[str]) -> str:
    """What a report says of them."""
    return "".join(f"\n\nNot in the table: {line}." for line in diverged)


def refuse_diverged(diverged: Sequence[str]) -> None:
    """Raises `CommandError` if there are any; after all else is done."""
    if diverged:
        raise CommandError("; ".join(diverged))


def check_networks(entries: Mapping[str, Settings]) -> None:
    """Raises `CommandError` if a network cannot be built; before anything long begins."""
    for label, settings in entries.items():
        try:
            nnx.eval_shape(lambda settings=settings: build_network(settings, 2))
        except ValueError as error:
            raise CommandError(f"{label}: {error}") from error


def is_finished(settings: Settings, begins_with: str | None = None) -> bool:
    """Whether their workdir holds the records of a finished run of these settings and images.

    Args:
        settings: of the run.
        begins_with: a digest of its parameters before the first step, if the seed does not decide
            them.

    Raises:
        CommandError: if it holds a run of others, or one that cannot be read.
    """
    workdir = settings.workdir
    if not holds_run(workdir):
        return False
    config = read_config(workdir)
    found = differences(
        decisive(config.settings) | {"images": config.digests, "begins_with": config.begins_with},
        decisive(settings) | {"images": image_digests(settings.data), "begins_with": begins_with},
    )
    if found:
        raise CommandError(
            f"the run in {workdir} has other settings ({'; '.join(found)}): take another --output"
        )
    return (workdir / "summary.json").is_file()


@functools.lru_cache(maxsize=1)
def image_digests(settings: DataSettings) -> Mapping[str, str]:
    """Of the images of each split.

    Raises:
        DataError: if they cannot be had.
    """
    splits = load_data(settings, in_memory=False).splits
    return {name: split.summary.digest for name, split in splits.items()}


def folder_name(label: str) -> str:
    """`label` without spaces and other characters that a path should not have."""
    return re.sub(r"[^\w.-]+", "-", label).strip("-")


def named(name: str, settings: Settings) -> Settings:
    """`settings` with the convolution, width and rank of a name as `chansel-w32-r2`.

    The dense convolution has neither rank nor normalisation between parts, whatever `settings` say.

    Raises:
        ValueError: if the name is none.
    """
    match = re.fullmatch(r"(chansel|subkernel)(?:-w(\d+))?(?:-r(\d+))?", name)
    if match is None:
        raise ValueError(f"{name} must be {NAME_FORMAT}, CONV chansel or subkernel")
    conv, width, rank = match.groups()
    network = settings.network
    if conv == "subkernel":
        network = dataclasses.replace(network, rank=1, ranks=(), norm=False)
    if width is not None:
        network = dataclasses.replace(network, width=int(width))
    if rank is not None:
        network = dataclasses.replace(network, rank=int(rank), ranks=())
    return dataclasses.replace(settings, conv=conv, network=network)


def entries(names: Sequence[str], settings: Settings) -> dict[str, Settings]:
    """The settings of each name.

    Raises:
        ValueError: if a name is none.
    """
    return {name: named(name, settings) for name in names}


def overfitting_epoch(history: Sequence[Row], window: int = 5, rise: float = 0.02) -> int | None:
    """The epoch from which the validation loss rises; None if it does not.

    That of the lowest mean over `window` epochs, if the mean later lies `rise` (a share) above it.
    """
    losses = [row["val_loss"] for row in history]
    window = min(window, len(losses))
    means = [statistics.fmean(losses[i : i + window]) for i in range(len(losses) - window + 1)]
    lowest = min(range(len(means)), key=means.__getitem__)
    if max(means[lowest:]) < means[lowest] * (1 + rise):
        return None
    return history[lowest + window // 2]["epoch"]
