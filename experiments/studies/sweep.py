"""Several networks, each trained from several seeds."""

import dataclasses
import functools
import itertools
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from flax import nnx
from rich.console import Console

from chansel_jax.errors import OneLineError
from chansel_jax.factorize import take_factors
from chansel_jax.training.distillation import Teacher
from experiments.cli.errors import CommandError
from experiments.studies.runs import RUNS, Record, finished, read_records, refuse
from experiments.training.load import load_run
from experiments.training.loop import DivergedError
from experiments.training.records import Row
from experiments.training.scores import Wanted
from experiments.training.settings import RECIPES, DataSettings, Settings, build_network, with_dense

NAME_FORMAT = "CONV[-wWIDTH][-rRANK]"
AT_RATE = " at "  # between the label of an entry and its learning rate
NO_ORIGINS: Mapping[str, "Origin"] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The runs of one network, one a seed.

    Attributes:
        label: what it is called.
        runs: in the order of the seeds.
        tried: the run that chose the learning rate by its validation images, and is not reported
            for that, where there are others.
    """

    label: str
    runs: Sequence[Record]
    tried: Sequence[Record] = ()

    def values(self, name: str) -> list[float]:
        """A figure of all runs."""
        return [run.figures[name] for run in self.runs]

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


@dataclasses.dataclass(frozen=True)
class Origin:
    """Another entry, whose network of the same seed, after its last epoch, one needs.

    Attributes:
        label: of the other entry, which comes before the one that needs it.
        use: whether that one begins with the network's factors, as `take_factors` gives them, or
            has the network as its teacher.
    """

    label: str
    use: Literal["factors", "teacher"]


def run_all(
    entries: Mapping[str, Settings],
    seeds: Sequence[int],
    output: Path,
    console: Console,
    wanted: Sequence[Wanted] = (),
    tuned_by: str | None = None,
    origins: Mapping[str, Origin] = NO_ORIGINS,
    folds: bool = False,
) -> tuple[list[Outcome], list[str]]:
    """Trains every entry from every seed, as far as it is not done already.

    All entries are trained from the first seed before any is from the next.

    Args:
        entries: settings by label.
        seeds: in place of theirs.
        output: holds their records and folders, named after label and seed; see `finished`.
        console: takes the progress.
        wanted: scores of each run.
        tuned_by: of entries `at_rates`, the figure by which `best_rates` chooses after the first
            seed; the others are trained from no further one. If it is of validation images, the
            best are reported by their further seeds alone.
        origins: of entries that need another's network, by label.
        folds: whether each seed has a fold of the images of its own, as in `of_seed`.

    Returns:
        What came out, and a line for each training that is left out: it diverged.

    Raises:
        OneLineError: as `finished`, or if an entry has wrong settings, or no loss was finite, or an
            entry needs a network of which there is the record alone.
    """
    check_networks(entries)
    check_origins(entries, seeds, output, origins)
    train = functools.partial(
        _train, output=output, console=console, wanted=wanted, origins=origins, folds=folds
    )
    outcomes, diverged = train(entries, seeds[:1] if tuned_by else seeds)
    if not outcomes:
        raise CommandError("; ".join(diverged))
    if tuned_by and seeds[1:]:
        best = {outcome.label: entries[outcome.label] for outcome in best_rates(outcomes, tuned_by)}
        further, lost = train(best, seeds[1:])
        runs = {outcome.label: outcome.runs for outcome in further}
        outcomes = [_with_further(o, runs.get(o.label, ()), tuned_by) for o in outcomes]
        diverged += lost
    return outcomes, diverged


def _with_further(outcome: Outcome, runs: Sequence[Record], tuned_by: str) -> Outcome:
    if runs and "val_" in tuned_by:
        return Outcome(outcome.label, runs, tried=outcome.runs)
    return Outcome(outcome.label, [*outcome.runs, *runs])


def _train(
    entries: Mapping[str, Settings],
    seeds: Sequence[int],
    *,
    output: Path,
    console: Console,
    wanted: Sequence[Wanted],
    origins: Mapping[str, Origin],
    folds: bool,
) -> tuple[list[Outcome], list[str]]:
    done: dict[str, list[Record]] = {label: [] for label in entries}
    diverged: dict[tuple[str, int], str] = {}
    every = list(itertools.product(seeds, entries.items()))
    for number, (seed, (label, settings)) in enumerate(every, start=1):
        console.print(f"\n[{number}/{len(every)}] {label}, seed {seed}")
        given, name = of_seed(settings, seed, folds), run_name(label, seed)
        origin = origins.get(label)
        try:
            if origin and (origin.label, seed) in diverged:
                raise DivergedError(f"{origin.label}, whose network it needs, diverged")
            learned = origin_of(origin, seed, given, output, name) if origin else {}
            done[label].append(finished(output, name, given, console, wanted, **learned))
        except DivergedError as error:
            diverged[label, seed] = f"{label}, seed {seed}: {error}"
            console.print(diverged[label, seed])
    return [Outcome(label, runs) for label, runs in done.items() if runs], [*diverged.values()]


def of_seed(settings: Settings, seed: int, folds: bool) -> Settings:
    """`settings` with a seed; with `folds` that one is the number of the fold too."""
    data = dataclasses.replace(settings.data, fold=seed) if folds else settings.data
    return dataclasses.replace(settings, seed=seed, data=data)


def origin_of(
    origin: Origin, seed: int, settings: Settings, output: Path, name: str
) -> dict[str, Any]:
    """What `finished` is to be given of the network that an entry needs.

    Where that network cannot be loaded and the run has its line, the line is trusted.
    """
    try:
        run = load_run(output / "runs" / run_name(origin.label, seed), "last", refuse)
    except OneLineError:
        if name in read_records(output / RUNS):
            return {"same_beginning": False}
        raise
    if origin.use == "teacher":
        return {"teacher": Teacher(run.network)}
    network = build_network(settings, len(run.class_names))
    take_factors(network, run.network)
    return {"network": network}


def check_origins(
    entries: Mapping[str, Settings],
    seeds: Sequence[int],
    output: Path,
    origins: Mapping[str, Origin],
) -> None:
    """Raises `CommandError` if an entry needs a network of which there is the record alone."""
    records = read_records(output / RUNS)
    for seed, label in itertools.product(seeds, entries.keys() & origins.keys()):
        needed = run_name(origins[label].label, seed)
        workdir = output / "runs" / needed
        if run_name(label, seed) not in records and needed in records and not workdir.exists():
            raise CommandError(
                f"{label}, seed {seed}, needs the network of {needed}, of which there is the "
                f"record alone: {workdir} is gone"
            )


def check_networks(entries: Mapping[str, Settings]) -> None:
    """Raises `CommandError` if a network cannot be built; before anything long begins."""
    for label, settings in entries.items():
        try:
            nnx.eval_shape(lambda settings=settings: build_network(settings, 2))
        except ValueError as error:
            raise CommandError(f"{label}: {error}") from error


def run_name(label: str, seed: int) -> str:
    """What the run of an entry is called."""
    return f"{folder_name(label)}-seed{seed}"


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
        raise ValueError(f"{name} must be named {NAME_FORMAT}, where CONV is chansel or subkernel")
    conv, width, rank = match.groups()
    settings = with_dense(settings) if conv == "subkernel" else settings
    network = settings.network
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


def best_recipe(data: DataSettings, epochs: int) -> Settings:
    """The recipe `best` with so many epochs, which most studies change one thing of."""
    return Settings(data=data, training=dataclasses.replace(RECIPES["best"], epochs=epochs))


def changed(settings: Any, changes: Mapping[str, Any]) -> Any:
    """`settings` with the named values, wherever in it they are."""
    new = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in changes:
            new[field.name] = changes[field.name]
        elif dataclasses.is_dataclass(value):
            new[field.name] = changed(value, changes)
    return dataclasses.replace(settings, **new)


def at_rates(entries: Mapping[str, Settings], rates: Sequence[float]) -> dict[str, Settings]:
    """Every entry at every learning rate, which its label names; `best_rates` chooses of them."""
    return {
        f"{label}{AT_RATE}{rate:g}": changed(settings, {"learning_rate": rate})
        for label, settings in entries.items()
        for rate in rates
    }


def network_of(label: str) -> str:
    """The label of an entry before `at_rates`, if it is one of those."""
    before, at, _ = label.rpartition(AT_RATE)
    return before if at else label


def best_rates(outcomes: Sequence[Outcome], figure: str) -> list[Outcome]:
    """Of outcomes that differ in their learning rate alone the best, by the first seed's figure.

    Args:
        outcomes: with labels of `at_rates`.
        figure: its name; of a loss the lowest is best, of an accuracy the highest.
    """
    sign = -1 if figure.endswith("accuracy") else 1

    def badness(outcome: Outcome) -> tuple[bool, float]:
        value = (outcome.tried or outcome.runs)[0].figures[figure]
        return math.isnan(value), sign * value

    best: dict[str, Outcome] = {}
    for outcome in sorted(outcomes, key=badness):
        best.setdefault(network_of(outcome.label), outcome)
    return [outcome for outcome in outcomes if outcome in best.values()]


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
