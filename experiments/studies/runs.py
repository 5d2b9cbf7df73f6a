"""The runs of an experiment: each is a line of its `runs.jsonl`, or is trained now."""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console

from chansel_jax.digest import digest
from chansel_jax.files import replaced
from chansel_jax.functional import network_tree
from chansel_jax.networks.resnet import ResNet
from chansel_jax.training.checkpoint import check_workdir
from chansel_jax.training.distillation import Teacher
from experiments.cli.command import make_output
from experiments.cli.differences import differences
from experiments.cli.errors import CommandError
from experiments.cli.flags import refused_value
from experiments.training.experiment import describe_teacher, load_data
from experiments.training.load import load_run, readable
from experiments.training.records import Row
from experiments.training.run import BEFORE_THEY_WERE, train_and_evaluate
from experiments.training.scores import Wanted, measure
from experiments.training.settings import DataSettings, Settings, decisive
from experiments.training.workdir import DATA_DIR, filled, refuse_among_images

RUNS = "runs.jsonl"


@dataclasses.dataclass(frozen=True)
class Record:
    """All that is kept of a finished run; a line of `runs.jsonl` is a JSON object of these names.

    Attributes:
        name: of the run.
        settings: all that decide its result, as in `config.json`; one that is missing is younger
            than the run, which had its default.
        data: `class_names`, `image_shape` `(H, W, C)`, `images` (how many) and `digests` of each
            split, `mean` and `std` `(C,)` of the training images, whose pixels are from 0 to 255.
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
    evaluations: Mapping[str, Mapping[str, Any]]
    begins_with: str | None = None
    teacher: Mapping[str, Any] | None = None

    def __post_init__(self):
        if len(self.metrics) != self.summary["epochs"]:
            raise ValueError(f"{len(self.metrics)} epochs of {self.summary['epochs']}")

    @property
    def figures(self) -> dict[str, Any]:
        """The summary, with `plain_NAME_loss` and `plain_NAME_accuracy` of each evaluation."""
        return {**self.summary} | {
            f"plain_{name}_{figure}": found[figure]
            for name, found in self.evaluations.items()
            for figure in ("loss", "accuracy")
        }

    def has(self, wanted: Wanted) -> bool:
        """Whether these scores are there, of the right checkpoint and the run's own images."""
        known = {
            "epoch": self.summary["best_epoch" if wanted.checkpoint == "best" else "epochs"],
            "images_sha256": self.data["digests"].get(wanted.split),
        }
        return known.items() <= self.evaluations.get(wanted.name, {}).items()


def make_folder(output: Path, data: DataSettings) -> None:
    """Makes the folder of --output, in which runs on `data` will be.

    Raises:
        CheckpointError: if no checkpoints can be kept in it.
        WorkdirError: if it lies among the images.
        CommandError: if it is a file or cannot be made or written to.
    """
    refuse_among_images("output", output, data)
    check_workdir(output, "output")
    make_output(output)


def record_of(workdir: Path) -> Record:
    """That of the finished run in `workdir`.

    Raises:
        CommandError: if one of its files is not there or cannot be read.
    """
    with readable(f"the run in {workdir}"):
        config = json.loads((workdir / "config.json").read_text())
        config.pop(DATA_DIR, None)  # it says something of the machine, not of the result
        rows = (workdir / "metrics.jsonl").read_text().splitlines()
        return Record(
            name=workdir.name,
            **config,
            metrics=[json.loads(row) for row in rows],
            summary=json.loads((workdir / "summary.json").read_text()),
            evaluations={
                path.stem.removeprefix("evaluation-"): json.loads(path.read_text())
                for path in sorted(workdir.glob("evaluation-*.json"), key=lambda path: path.stem)
            },
        )


def read_records(path: Path) -> dict[str, Record]:
    """The records in a `runs.jsonl` by name; none if it is not there.

    Raises:
        CommandError: if a line cannot be read, naming it.
    """
    found = {}
    lines = path.read_text().splitlines() if path.exists() else ()
    for number, line in enumerate(lines, start=1):
        with readable(f"{path}, line {number},"):
            record = Record(**json.loads(line))
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
) -> Record:
    """The record of a run, from its line in `output/runs.jsonl`.

    A run without a line is trained in `output/runs/NAME`, as far as it was not yet, and its line
    added. The line is enough later on: it may come from another machine, and the folder may go.

    Args:
        output: of the experiment.
        name: of the run.
        settings: of the run; its folder takes the place of their `workdir`.
        console: takes the progress.
        wanted: scores that the record must hold; they are measured if it does not.
        network: with the parameters to begin with, as in `train_and_evaluate`.
        teacher: what the network learns from, likewise.

    Raises:
        OneLineError: as `train_and_evaluate` and `measure`, also for a refused setting; or if the
            run is there with other settings, images or parameters, or its line or one of its files
            cannot be read.
        DivergedError: if a loss is not finite.
    """
    path, workdir = output / RUNS, output / "runs" / name
    recorded = read_records(path).get(name)
    if recorded or (workdir / "summary.json").is_file():
        record = recorded or record_of(workdir)
        if found := others(record, settings, network, teacher):
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
            console.print(f"{name}: ", end="")
            measure(
                load_run(workdir, each.checkpoint), each, settings.data.data_dir, workdir, console
            )
            record = record_of(workdir)
    if record is not recorded:
        write_record(path, record)
    return record


def others(
    record: Record, settings: Settings, network: ResNet | None, teacher: Teacher | None
) -> list[str]:
    """In what a run differs from one of `settings`, their images and these networks' parameters."""
    there = {
        "settings": record.settings,
        "images": record.data.get("digests"),
        "begins_with": record.begins_with,
        "teacher": record.teacher,
    }
    asked = {
        "settings": decisive(settings),
        "images": image_digests(settings.data),
        "begins_with": network and digest(network_tree(network)),
        "teacher": describe_teacher(teacher),
    }
    return differences(filled(there, BEFORE_THEY_WERE), asked)


@functools.lru_cache(maxsize=1)
def image_digests(settings: DataSettings) -> Mapping[str, str]:
    """Of the images of each split."""
    splits = load_data(settings, in_memory=False).splits
    return {name: split.summary.digest for name, split in splits.items()}
