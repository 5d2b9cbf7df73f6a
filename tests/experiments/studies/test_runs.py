"""Runs that are lines of `runs.jsonl`."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

import experiments
from experiments.cli.errors import CommandError
from experiments.studies import runs
from experiments.studies.runs import finished, read_records, record_of, write_record
from experiments.training.scores import Wanted

pytestmark = pytest.mark.usefixtures("whole")
QUIET = Console(quiet=True)


@pytest.fixture
def there(settings, tmp_path):
    """An experiment that holds the line of a run, and not its folder."""
    (tmp_path / "runs").mkdir()
    write_record(tmp_path / "runs.jsonl", record_of(settings.workdir))
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """The folders of all runs that are trained, by copying the finished one."""
    found = []

    def train(settings, console, network=None, teacher=None):
        found.append(settings.workdir)

    monkeypatch.setattr(runs, "train_and_evaluate", train)
    return found


def test_a_line_holds_all_that_the_folder_does(there, settings, whole):
    (line,) = (there / "runs.jsonl").read_text().splitlines()
    written, workdir = json.loads(line), settings.workdir
    config = json.loads((workdir / "config.json").read_text())
    del config["data_dir"]  # of the machine, not of the result
    assert {"settings": written["settings"], "data": written["data"]} == config
    assert written["summary"] == json.loads((workdir / "summary.json").read_text())
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    assert written["metrics"] == [json.loads(row) for row in rows]
    assert read_records(there / "runs.jsonl") == {"whole": record_of(workdir)}
    summary, _ = whole
    assert set(summary["lowerings"]) == {"chansel", "subkernel"}
    assert summary["instruction_set"] in (None, "baseline", "avx2", "avx512")


def test_a_finished_run_needs_its_line_only(there, settings, trained):
    record = finished(there, "whole", settings, QUIET)
    assert record == record_of(settings.workdir) and not trained
    (line,) = (there / "runs.jsonl").read_text().splitlines()
    older = json.loads(line)
    del older["settings"]["network"]["norm"], older["settings"]["training"]["accumulate"]
    (there / "runs.jsonl").write_text(json.dumps(older) + "\n")
    assert finished(there, "whole", settings, QUIET).summary == record.summary  # as by default


def test_a_line_of_other_settings_or_images_is_refused(there, settings, trained):
    network = dataclasses.replace(settings.network, width=8)
    changed = dataclasses.replace(settings, seed=1, network=network)
    message = r"whole in .* other settings \(width: 4 → 8; seed: 0 → 1\): take another --output"
    with pytest.raises(CommandError, match=message):
        finished(there, "whole", changed, QUIET)
    data = dataclasses.replace(settings.data, train_images=9)
    with pytest.raises(CommandError, match=r"train: \w+… → .*train_images: None → 9"):
        finished(there, "whole", dataclasses.replace(settings, data=data), QUIET)
    record = dataclasses.replace(record_of(settings.workdir), begins_with="0" * 64)
    write_record(there / "runs.jsonl", record)
    with pytest.raises(CommandError, match=r"begins_with: 0{8}… → None"):
        finished(there, "whole", settings, QUIET)
    assert not trained


def test_a_finished_folder_becomes_a_line_with_the_scores_that_are_wanted(
    settings, tmp_path, trained
):
    folder = tmp_path / "runs" / "again"
    shutil.copytree(settings.workdir, folder)
    wanted = Wanted("validation", "last")
    record = finished(tmp_path, "again", settings, QUIET, [wanted])
    scores = json.loads((folder / "evaluation-validation.json").read_text())
    assert record.evaluations == {"validation": scores} and scores["epoch"] == 3
    assert record.figures["plain_validation_loss"] == scores["loss"]

    def again(wanted):
        return finished(tmp_path, "again", settings, QUIET, [wanted])

    for wrong in ({"images_sha256": "0"}, {"epoch": 1}):
        written = {"validation": {**scores, **wrong}}
        write_record(tmp_path / "runs.jsonl", dataclasses.replace(record, evaluations=written))
        assert again(wanted) == record  # measured anew
    shutil.rmtree(folder)
    assert again(wanted) == record
    message = "line of again in .* has no score validation-flip-averaged, and .* is gone"
    with pytest.raises(CommandError, match=message):
        again(Wanted("validation", flip_average=True))
    assert read_records(tmp_path / "runs.jsonl") == {"again": record} and not trained


def test_a_run_without_a_line_is_trained(there, settings, trained):
    with pytest.raises(CommandError, match="the run in .*new cannot be read .*No such file"):
        finished(there, "new", settings, QUIET)
    assert trained == [there / "runs" / "new"]


def test_a_new_line_stands_behind_the_others_or_in_its_own_place(there, settings):
    first = record_of(settings.workdir)
    write_record(there / "runs.jsonl", dataclasses.replace(first, name="second"))
    write_record(there / "runs.jsonl", dataclasses.replace(first, begins_with="0"))
    lines = (there / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in lines] == ["whole", "second"]
    assert read_records(there / "runs.jsonl")["whole"].begins_with == "0"
    assert sorted(path.name for path in there.iterdir()) == ["runs", "runs.jsonl"]


def changed(**values):
    return lambda line: json.dumps(json.loads(line) | values)


SCORES = {
    "split": "validation",
    "epoch": 1,
    "flip_average": False,
    "images_sha256": "",
    "class_names": ["blue", "green", "red"],
    "loss": 1.0,
    "accuracy": 0.5,
    "precision": [1.0, None, 0.5],
    "recall": [1.0, 0.5, 0.0],
}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda line: line[: len(line) // 2], "char"),
        (lambda line: "[]", r"it=\[\] must be an object"),
        (lambda line: "[" * 100_000, "nest too deeply"),
        (lambda line: line.replace('"summary"', '"colour"'), "it has no colour"),
        (lambda line: line.replace('"epochs": 3', '"epochs": 4'), "3 epochs of 4"),
        (changed(summary={"epochs": 3}), "summary lacks best_accuracy_epoch, best_epoch, "),
        (changed(summary={}), "3 epochs of None"),
        (changed(metrics=[1, 2]), r"metrics\[0\]=1 must be an object"),
        (changed(data=None), "data=None must be an object"),
        (changed(data={"mean": [1]}), "data lacks class_names, "),
        (changed(evaluations=None), "evaluations=None must be an object"),
        (changed(evaluations={"validation": 1}), "evaluations.validation=1 must be an object"),
        (changed(evaluations={"validation": {}}), "evaluations.validation lacks .*, confusion, "),
        (changed(evaluations={"validation": SCORES | {"confusion": [[1], 2]}}), "confusion.1.=2 "),
        (changed(evaluations={"validation": SCORES | {"confusion": [[1]]}}), "must be 3 × 3"),
    ],
)
def test_a_damaged_line_is_named(there, settings, damage, message):
    path = there / "runs.jsonl"
    line = path.read_text().rstrip("\n")
    path.write_text(f"{line}\n{damage(line)}\n")
    with pytest.raises(CommandError, match=f"^{path}, line 2, cannot be read .*{message}") as error:
        finished(there, "whole", settings, QUIET)
    assert "\n" not in str(error.value)


def test_a_file_of_other_bytes_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(CommandError, match=f"^{path}, line 1, cannot be read "):
        read_records(path)


def test_a_byte_order_mark_and_blank_lines_are_passed_over(there):
    path = there / "runs.jsonl"
    before = read_records(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\n  \n")
    assert read_records(path) == before


def test_what_was_found_can_be_read():
    paths = list(Path(experiments.__file__).parent.glob("results/*/runs.jsonl"))
    assert len(paths) == 15 and all(map(read_records, paths))


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("")])
@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "evaluation-validation.json"])
def test_a_finished_run_gets_its_lost_files_again(settings, tmp_path, name, damage):
    folder, wanted = tmp_path / "runs" / "again", [Wanted("validation")]
    shutil.copytree(settings.workdir, folder)
    record = finished(tmp_path, "again", settings, QUIET, wanted)
    (tmp_path / "runs.jsonl").unlink()
    damage(folder / name)
    assert finished(tmp_path, "again", settings, QUIET, wanted) == record == record_of(folder)


def test_no_other_checkpoint_is_measured_in_the_place_of_a_damaged_one(settings, tmp_path):
    folder = tmp_path / "runs" / "again"
    shutil.copytree(settings.workdir, folder)
    best = record_of(folder).summary["best_epoch"]
    (folder / "checkpoints" / str(best) / "metrics" / "metrics").write_text("")
    with pytest.raises(CommandError, match=f"checkpoint of epoch {best} is damaged"):
        finished(tmp_path, "again", settings, QUIET, [Wanted("validation")])
    assert not (folder / "evaluation-validation.json").exists()


def test_a_damaged_folder_is_named(settings, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(settings.workdir, copy)
    (copy / "metrics.jsonl").write_text("")
    with pytest.raises(CommandError, match=f"the run in {copy} cannot .*0 epochs of 3"):
        record_of(copy)
    (copy / "summary.json").write_text("[]")
    with pytest.raises(CommandError, match=f"the run in {copy} cannot be read"):
        record_of(copy)
