"""The runs of an experiment: each is a line of its `runs.jsonl`, or is trained now."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from rich.console import Console

from chansel_jax.digest import digest
from chansel_jax.files import parse_json, read_json, replaced
from chansel_jax.functional import network_tree
from chansel_jax.networks.resnet import ResNet
from chansel_jax.training.checkpoint import check_workdir
from chansel_jax.training.distillation import Teacher
from experiments.cli.command import check_output
from experiments.cli.differences import differences
from experiments.cli.errors import CommandError
from experiments.cli.flags import refused_value
from experiments.training.experiment import DataDescription, describe_teacher, load_data
from experiments.training.load import load_run, readable
from experiments.training.records import Row, Summary
from experiments.training.run import BEFORE_THEY_WERE, train_and_evaluate
from experiments.training.scores import Evaluation, Wanted, evaluation_from, measure
from experiments.training.settings import DataSettings, Settings, decisive, in_todays_names
from experiments.training.typed_json import from_json
from experiments.training.workdir import DATA_DIR, filled, refuse_among_images

RUNS = "runs.jsonl"
MOST_FOLDS = 10  # of images that are kept in mind


@dataclasses.dataclass(frozen=True)
class Record:
    """All that is kept of a finished run; a line of `runs.jsonl` is a JSON object of these names.

    Attributes:
        name: of the run.
        settings: all that decide its result, as in `config.json`; one that is missing is younger
            than the run, which had its default.
        data: as in `DataDescription`; that of a run from before there was any is empty, and no
            report takes it.
        metrics: a row an epoch, as in `metrics.jsonl`.
        summary: as in `summary.json`.
        evaluations: by name, as in `evaluation-NAME.json`.
        begins_with: a digest of the parameters before the first step, where the seed does not
            decide them.
        teacher: a digest of the parameters of a network that it learned from, and how much that one
            counted.
    """

    name: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    metrics: Sequence[Row]
    summary: Mapping[str, Any]
    evaluations: Mapping[str, Evaluation]
    begins_with: str | None = None
    teacher: Mapping[str, Any] | None = None

    def __post_init__(self):
        epochs = self.summary.get("epochs")
        if len(self.metrics) != epochs:
            raise ValueError(f"{len(self.metrics)} epochs of {epochs}")

    @property
    def figures(self) -> dict[str, Any]:
        """The summary, with `plain_NAME_loss` and `plain_NAME_accuracy` of each evaluation.

        Where its classes are many there is `plain_NAME_top5_accuracy` too.
        """
        return {**self.summary} | {
            f"plain_{name}_{figure}": found[figure]
            for name, found in self.evaluations.items()
            for figure in ("loss", "accuracy", "top5_accuracy")
            if figure in found
        }

    def has(self, wanted: Wanted) -> bool:
        """Whether these scores are there, of the right checkpoint and the run's own images."""
        known = {
            "epoch": self.summary["best_epoch" if wanted.checkpoint == "best" else "epochs"],
            "images_sha256": self.data["digests"].get(wanted.split),
        }
        return known.items() <= self.evaluations.get(wanted.name, {}).items()


def check_runs_output(output: Path, data: DataSettings, command: str) -> None:
    """Checks the folder of --output, in which the runs of a command on `data` will be.

    Raises:
        CheckpointError: if no checkpoints can be kept in it.
        WorkdirError: if it lies among the images.
        CommandError: as `check_output`.
    """
    refuse_among_images("output", output, data)
    check_workdir(output, "output")
    check_output(output, command)


def record_of(workdir: Path) -> Record:
    """That of the finished run in `workdir`.

    Raises:
        CommandError: if one of its files is not there or cannot be read; but an evaluation that
            cannot is left out, and measured again where it is wanted.
    """
    evaluations = {}
    for path in sorted(workdir.glob("evaluation-*.json"), key=lambda path: path.stem):
        with contextlib.suppress(OSError, ValueError):
            evaluations[path.stem.removeprefix("evaluation-")] = evaluation_from(read_json(path))
    with readable(f"the run in {workdir}"):
        config = from_json(Mapping[str, Any], read_json(workdir / "config.json"), "config")
        config.pop(DATA_DIR, None)  # it says something of the machine, not of the result
        rows = (workdir / "metrics.jsonl").read_bytes().splitlines()
        content = {
            "name": workdir.name,
            "metrics": [parse_json(row) for row in rows],
            "summary": read_json(workdir / "summary.json"),
            "evaluations": evaluations,
        }
        return record_from(config | content)


def record_from(content: Any) -> Record:
    """A record from its JSON form; raises `ValueError` if it is none, as `from_json` does."""
    record = from_json(Record, in_todays_names(content))
    for name, each in record.evaluations.items():
        evaluation_from(each, f"evaluations.{name}")
    if record.data:
        from_json(DataDescription, record.data, "data")
        from_json(Summary, record.summary, "summary")
    return record


def read_records(path: Path) -> dict[str, Record]:
    """The records in a `runs.jsonl` by name; none if it is not there.

    Raises:
        CommandError: if a line cannot be read, naming it.
    """
    found = {}
    lines = path.read_bytes().splitlines() if path.exists() else ()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            with readable(f"{path}, line {number},"):
                record = record_from(parse_json(line))
                found[record.name] = record
    return found


def write_record(path: Path, record: Record) -> None:
    """Adds the line of `record` to a `runs.jsonl`, in place of one of the same name.

    The file is replaced as a whole; another process that adds to it waits.
    """
    with FileLock(path.with_name("runs") / ".lock"), replaced(path) as partial:
        records = read_records(path) | {record.name: record}
        partial.write_text("".join(json.dumps(vars(each)) + "\n" for each in records.values()))


def finished(
    output: Path,
    name: str,
    settings: Settings,
    console: Console,
    wanted: Sequence[Wanted] = (),
    network: ResNet | None = None,
    teacher: Teacher | None = None,
    same_beginning: bool = True,
) -> Record:
    """The record of a run, from its line in `output/runs.jsonl`.

    A run without a line is trained in `output/runs/NAME`, as far as it was not yet, and its line
    added; files of it that are lost are made again. The line is enough later on: it may come from
    another machine, and the folder may go.

    Args:
        output: of the experiment.
        name: of the run.
        settings: of the run; its folder takes the place of their `workdir`.
        console: takes the progress.
        wanted: scores that the record must hold; they are measured if it does not.
        network: with the parameters to begin with, as in `train_and_evaluate`.
        teacher: what the network learns from, likewise.
        same_beginning: whether a run that is there must have begun with the parameters of
            `network`, and learned from `teacher`; True by default.

    Raises:
        OneLineError: as `train_and_evaluate` and `measure`, also for a refused setting; or if the
            run is there with other settings, images or parameters, or its line cannot be read, or
            the checkpoint that is to be measured.
        DivergedError: if a loss or a parameter is not finite.
    """
    path, workdir = output / RUNS, output / "runs" / name
    recorded = read_records(path).get(name)
    record = recorded or whole_record(workdir)
    if record:
        if found := others(record, settings, network, teacher, same_beginning):
            raise CommandError(
                f"the run {name} in {output} has other settings ({'; '.join(found)}): "
                "take another --output"
            )
        console.print(f"finished before: {name}")
    else:
        given = dataclasses.replace(settings, workdir=workdir, resume="auto")
        try:
            train_and_evaluate(given, console, network, teacher)
        except ValueError as error:
            if refused_value(error, given) is None:
                raise
            # The run's setting may be no flag of the command, which could not tell that it is one.
            raise CommandError(f"{name}: {error}") from error
        record = record_of(workdir)
    for each in wanted:
        if not record.has(each):
            if not workdir.is_dir():
                raise CommandError(
                    f"the line of {name} in {path} has no score {each.name}, and the run's folder "
                    f"{workdir}, from which it could be measured, is gone"
                )
            console.print(f"{name}: ", end="")
            trained = load_run(workdir, each.checkpoint, refuse)
            measure(trained, each, settings.data.data_dir, workdir, console)
            record = record_of(workdir)
    if record is not recorded:
        write_record(path, record)
    return record


def whole_record(workdir: Path) -> Record | None:
    """That of the run in `workdir`; None if it is not finished, or has lost some of its files."""
    if (workdir / "summary.json").is_file():
        with contextlib.suppress(CommandError):
            return record_of(workdir)
    return None


def refuse(damaged: str) -> None:
    """Raises `CommandError`: in the place of a damaged checkpoint no other is measured."""
    raise CommandError(damaged)


def others(
    record: Record,
    settings: Settings,
    network: ResNet | None,
    teacher: Teacher | None,
    same_beginning: bool,
) -> list[str]:
    """In what a run differs from one of `settings`, their images and these networks' parameters."""
    there = {"settings": record.settings, "images": record.data.get("digests")}
    asked = {"settings": decisive(settings), "images": image_digests(settings.data)}
    if same_beginning:
        there |= {"begins_with": record.begins_with, "teacher": record.teacher}
        asked["begins_with"] = network and digest(network_tree(network))
        asked["teacher"] = describe_teacher(teacher)
    return differences(filled(there, BEFORE_THEY_WERE), asked)


@functools.lru_cache(maxsize=MOST_FOLDS)
def image_digests(settings: DataSettings) -> Mapping[str, str]:
    """Of the images of each split."""
    splits = load_data(settings, in_memory=False).splits
    return {name: split.summary.digest for name, split in splits.items()}


@functools.lru_cache(maxsize=MOST_FOLDS)
def image_labels(settings: DataSettings, split: str) -> np.ndarray:
    """Of the images of a split, `(N,)`."""
    return load_data(settings, in_memory=False).splits[split].labels
