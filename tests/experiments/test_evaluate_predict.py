"""A run loaded again, evaluated, and predicting."""

import csv
import dataclasses
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from chansel_jax.errors import OneLineError
from chansel_jax.training.prediction import scores
from experiments import evaluate, predict
from experiments.cli.errors import CommandError
from experiments.training.load import load_images, load_run
from experiments.training.scores import share_or_none
from experiments.training.settings import Settings
from experiments.training.typed_json import from_json


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120)


def printed(console):
    return console.file.getvalue()


@pytest.fixture
def trained(settings, whole):
    """The folder of a run."""
    return settings.workdir


@pytest.fixture
def copy(trained, tmp_path):
    subprocess.run(["cp", "-r", str(trained), str(tmp_path / "copy")], check=True)
    return tmp_path / "copy"


# Loading


def test_settings_survive_json(settings):
    there = json.loads(json.dumps(dataclasses.asdict(settings), default=str))
    assert from_json(Settings, there) == settings
    there["network"]["colour"] = "red"
    with pytest.raises(ValueError, match="^network has no colour$"):
        from_json(Settings, there)


def test_run_is_loaded_as_it_was(trained, settings, whole):
    summary, _ = whole
    run = load_run(trained)
    assert (run.epoch, run.class_names) == (summary["best_epoch"], ("blue", "green", "red"))
    assert load_run(trained, "last").epoch == 3 and run.image_shape == (8, 8, 3)
    assert run.network.config.width == 4
    dataset, others = load_images(run, settings.data.data_dir)
    assert set(dataset.splits) == {"train", "validation"} and others == ()


def test_images_are_found_where_they_were_or_where_they_are_said_to_be(trained, copy, settings):
    config = json.loads((copy / "config.json").read_text())
    assert config["data_dir"] == str(settings.data.data_dir)
    assert load_images(load_run(trained), None)[1] == ()
    (copy / "config.json").write_text(json.dumps({**config, "data_dir": "/no/such/folder"}))
    run = load_run(copy)
    with pytest.raises(OneLineError, match="--data-dir=PATH"):
        load_images(run, None)
    assert load_images(run, settings.data.data_dir)[1] == ()


def of_data(**values):
    return lambda config: config["data"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config["settings"].update(colour=1), r"\(settings has no colour\)"),
        (lambda config: config.pop("data"), r"\(it lacks data\)"),
        (lambda config: config["settings"]["training"].update(epochs=0), "epochs=0 must be"),
        (lambda config: config["settings"]["network"].update(width=8), "cannot restore"),
        (lambda config: config["settings"]["data"].update(split_seed="a"), r"data.split_seed='a' "),
        (of_data(image_shape=[16]), r"data.image_shape=\[16\] must be an array of 3"),
        (of_data(image_shape=["8", "8", "3"]), r"data.image_shape\[0\]='8' must be an integer"),
        (of_data(image_shape=[8, 0, 3]), r"image_shape=\(8, 0, 3\) must be \(height, width, 3\)"),
        (of_data(mean=[1, 2]), r"data.mean=\[1, 2\] must be an array of 3"),
        (of_data(mean=[1, 2, -3]), r"mean=\(1, 2, -3\) must be from 0 to 255"),
        (of_data(std=[0, 0, 0]), r"std=\(0, 0, 0\) must be above 0"),
        (of_data(digests=None), "data.digests=None must be an object"),
        (of_data(class_names=[1, 2]), r"data.class_names\[0\]=1 must be a text"),
        (of_data(class_names="ab"), "data.class_names='ab' must be an array"),
    ],
)
def test_run_that_cannot_be_read(copy, change, message):
    config = json.loads((copy / "config.json").read_text())
    change(config)
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(OneLineError, match=message) as error:
        load_run(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "[" * 100_000], ids=len)
def test_config_that_is_no_object(copy, content):
    (copy / "config.json").write_text(content)
    with pytest.raises(CommandError, match=f"^{copy}/config.json cannot be read "):
        load_run(copy)


def test_damaged_checkpoint_is_passed_over_and_named(copy, settings, whole, console):
    best = whole[0]["best_epoch"]
    record = copy / "checkpoints" / str(best) / "record" / "metadata"
    record.write_text(record.read_text().replace('"val_loss": ', '"val_loss": 1'))
    evaluate.evaluate(evaluate.Settings(copy), console)
    assert f"checkpoint of epoch {best} is damaged (the digest of its record" in printed(console)
    other = json.loads((copy / "evaluation-validation.json").read_text())["epoch"]
    assert other in {1, 2, 3} - {best}


def test_no_run(tmp_path):
    with pytest.raises(CommandError, match=f"workdir={tmp_path} holds no run"):
        load_run(tmp_path)


def test_no_such_checkpoint(trained):
    with pytest.raises(OneLineError, match="no checkpoint of epoch 9, only "):
        load_run(trained, 9)


# Evaluation


def test_evaluation_is_that_of_the_training(trained, settings, whole, tmp_path, console):
    found = evaluate.evaluate(
        evaluate.Settings(trained, data_dir=settings.data.data_dir, output=tmp_path), console
    )
    summary, _ = whole
    assert found.loss == pytest.approx(summary["best_val_loss"], rel=1e-4)
    assert found.accuracy == pytest.approx(summary["val_accuracy_at_best"])
    written = json.loads((tmp_path / "evaluation-validation.json").read_text())
    assert written["confusion"] == found.confusion.tolist()
    assert written["predictions"] == found.predictions.tolist() and len(found.predictions) == 27
    assert written["accuracy"] == found.accuracy and np.sum(written["confusion"]) == 27
    for name in ("confusion-validation", "kernels"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.format == "PNG"
    assert (tmp_path / "mistakes-validation.png").exists() == (found.accuracy < 1)
    assert "27 images" in printed(console) and "not those of the run" not in printed(console)


def test_flip_averaged_scores_lie_beside_the_plain_ones(trained, images, tmp_path, console):
    settings = evaluate.Settings(trained, data_dir=images, flip_average=True, output=tmp_path)
    found = evaluate.evaluate(settings, console)
    written = json.loads((tmp_path / "evaluation-validation-flip-averaged.json").read_text())
    assert written["flip_average"] and written["loss"] == found.loss
    plain = evaluate.evaluate(dataclasses.replace(settings, flip_average=False), console)
    assert plain.loss != found.loss
    endings = "-flip-averaged", ""
    assert {path.name for path in tmp_path.iterdir()} == {
        "kernels.png",
        *(f"confusion-validation{ending}.png" for ending in endings),
        *(f"evaluation-validation{ending}.json" for ending in endings),
        *(
            f"mistakes-validation{ending}.png"
            for ending, scores in zip(endings, (found, plain), strict=True)
            if scores.accuracy < 1
        ),
    }


def test_class_without_predictions_has_no_precision(trained, console):
    run = load_run(trained)
    found = scores(np.eye(3, dtype=np.float32)[[0, 0]], np.array([0, 1]))
    assert share_or_none(found.precision) == [0.5, None, None]
    evaluate.print_scores(found, run, console)
    assert "–" in printed(console) and "nan" not in printed(console)


@pytest.mark.parametrize("width", [60, 80])
@pytest.mark.parametrize("classes", [10, 100])
def test_scores_of_many_classes_are_readable(trained, width, classes):
    names = tuple(f"kind_of_animal_{i}" for i in range(classes))
    run = dataclasses.replace(load_run(trained), class_names=names)
    labels = np.repeat(np.arange(classes), 1234)
    found = scores(np.eye(classes, dtype=np.float32)[labels], labels)
    console = Console(file=io.StringIO(), width=width, soft_wrap=True)
    evaluate.print_scores(found, run, console)
    lines = printed(console).splitlines()
    assert max(map(len, lines)) <= width and "…" not in printed(console)
    for name in names:
        first, *others = (line.split()[1:] for line in lines if line.startswith(f"{name} "))
        assert first[:3] == ["1,234", "100.00%", "100.00%"]
        if classes == 10:
            counts = [*first[3:], *(cell for line in others for cell in line)]
            assert counts == ["1,234" if other == name else "0" for other in names]
        else:
            assert len(first) == 3 and not others


def test_evaluation_on_other_images_says_so(trained, images, tmp_path, console):
    subprocess.run(["cp", "-r", str(images), str(tmp_path / "images")], check=True)
    next((tmp_path / "images" / "validation" / "red").iterdir()).unlink()
    settings = evaluate.Settings(trained, data_dir=tmp_path / "images", output=tmp_path / "out")
    evaluate.evaluate(settings, console)
    assert "note: the validation images are not those of the run" in printed(console)


def test_evaluation_refuses_what_is_not_there(trained, images, tmp_path, console):
    with pytest.raises(CommandError, match="split=test: .* train, validation only"):
        evaluate.evaluate(evaluate.Settings(trained, split="test", data_dir=images), console)
    for name in ("blue", "green", "violet"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / f"{i}.png")
    with pytest.raises(CommandError, match="classes blue, green, violet, the run in .* red"):
        evaluate.evaluate(evaluate.Settings(trained, data_dir=tmp_path), console)


# Prediction


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def unlabelled(images, tmp_path):
    """Images of the validation set, numbered, one in a folder of its own and one larger."""
    folder = tmp_path / "unlabelled"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("red", "blue", "green", "blue")):
        with Image.open(images / "validation" / name / f"{i}.png") as image:
            if i == 2:
                image = image.resize((24, 16))
            image.save(folder / ("more" if i == 3 else "") / f"{i:03}.png")
    return folder


def test_a_row_a_file(trained, unlabelled, tmp_path, console):
    output = tmp_path / "new" / "submission.csv"
    predict.predict(predict.Settings(trained, unlabelled, output), console)
    assert rows_of(output) == [
        ["id", "label"],
        ["000", "red"],
        ["001", "blue"],
        ["002", "green"],
        ["more/003", "blue"],
    ]
    assert list(output.parent.iterdir()) == [output]


def test_other_formats(trained, unlabelled, tmp_path, console):
    output = tmp_path / "submission.csv"
    settings = predict.Settings(trained, unlabelled, output)
    changed = dataclasses.replace(settings, columns=("file", "class"), labels="index")
    predict.predict(changed, console)
    assert rows_of(output)[:2] == [["file", "class"], ["000", "2"]]
    predict.predict(
        dataclasses.replace(settings, probabilities=True, flip_average=True, epoch="last"), console
    )
    heading, *rows = rows_of(output)
    assert heading == ["id", "blue", "green", "red"]
    values = np.array([row[1:] for row in rows], float)
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=2e-6)
    assert values.argmax(axis=1).tolist() == [2, 0, 1, 0]
    predict.predict(dataclasses.replace(settings, probabilities=True, labels="index"), console)
    assert rows_of(output)[0] == ["id", "0", "1", "2"]


def test_no_two_files_are_called_alike(tmp_path):
    def named(*names):
        return list(predict.row_names([tmp_path / name for name in names], tmp_path).values())

    assert named("a.png", "b.JPG", "c/a.png", "d") == ["a", "b", "c/a", "d"]
    assert named("a.png", "a.jpg", "b.png") == ["a.png", "a.jpg", "b"]
    assert named("a.png", "a.jpg", "a.png.jpg") == ["a.png", "a.jpg", "a.png.jpg"]
    assert named("a", "a.png") == ["a", "a.png"]


def test_names_keep_their_extensions_where_they_are_needed(trained, unlabelled, tmp_path, console):
    with Image.open(unlabelled / "000.png") as image:
        image.save(unlabelled / "000.jpg")
    predict.predict(predict.Settings(trained, unlabelled, tmp_path / "s.csv"), console)
    assert [row[0] for row in rows_of(tmp_path / "s.csv")][1:3] == ["000.jpg", "000.png"]


def test_rows_hold_any_name(trained, unlabelled, tmp_path, console):
    names = ("a\rb", "c\nd", 'e,"f"', " g ")
    for name in names:
        shutil.copy(unlabelled / "000.png", unlabelled / f"{name}.png")
    predict.predict(predict.Settings(trained, unlabelled, tmp_path / "s.csv"), console)
    found = [row for row in rows_of(tmp_path / "s.csv") if row[1] == "red"]
    assert found == [[name, "red"] for name in sorted(["000", *names])]


def test_files_that_are_no_images_are_named_and_the_rest_predicted(
    trained, unlabelled, tmp_path, console
):
    (unlabelled / "001.png").write_bytes((unlabelled / "001.png").read_bytes()[:60])
    (unlabelled / "notes.txt").write_text("no image")
    (unlabelled / ".hidden").write_text("no image")
    output = tmp_path / "submission.csv"
    with pytest.raises(CommandError, match=r"2 of 5 files are not predicted: 001.png, notes.txt$"):
        predict.predict(predict.Settings(trained, unlabelled, output), console)
    assert [row[0] for row in rows_of(output)] == ["id", "000", "002", "more/003"]
    assert printed(console).count("no image: ") == 2


def test_nothing_is_written_where_nothing_can_be_predicted(trained, tmp_path, console):
    output = tmp_path / "submission.csv"
    output.write_text("kept")
    folder = tmp_path / "images"
    with pytest.raises(CommandError, match="is not a folder"):
        predict.predict(predict.Settings(trained, folder, output), console)
    folder.mkdir()
    with pytest.raises(CommandError, match="holds no files"):
        predict.predict(predict.Settings(trained, folder, output), console)
    (folder / "notes.txt").write_text("no image")
    with pytest.raises(CommandError, match="holds no image that can be read"):
        predict.predict(predict.Settings(trained, folder, output), console)
    assert output.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "submission.csv"]


def test_a_file_beside_the_images_changes_no_names(trained, unlabelled, tmp_path, console):
    (unlabelled / "000.json").write_text("{}")
    with pytest.raises(CommandError, match="1 of 5 files are not predicted: 000.json"):
        predict.predict(predict.Settings(trained, unlabelled, tmp_path / "s.csv"), console)
    assert [row[0] for row in rows_of(tmp_path / "s.csv")] == [
        "id",
        "000",
        "001",
        "002",
        "more/003",
    ]


def test_all_files_but_hidden_ones_are_found(tmp_path, monkeypatch):
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "images"
    for path in (elsewhere / "a.png", elsewhere / "@eaDir" / "a.png", elsewhere / ".a.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    root.mkdir()
    (root / "link").symlink_to(elsewhere)
    output = tmp_path / "predictions.csv"
    assert predict.find_files(root, output) == [root / "link" / "a.png"]
    (elsewhere / "back").symlink_to(root)
    (root / "deep").mkdir()
    (root / "deep" / "link").symlink_to(elsewhere)
    (root / "none.png").symlink_to("nowhere")
    monkeypatch.chdir(root)
    found = [Path("deep/link/a.png"), Path("link/a.png"), Path("none.png")]
    assert predict.find_files(Path(), output) == found
    # What an earlier call wrote is no image, whatever it is called by.
    assert predict.find_files(Path(), root / "link" / "a.png") == found[2:]


@pytest.mark.parametrize("output", [Path(), Path("/")])
def test_output_that_is_a_folder_is_refused_first(output, console):
    with pytest.raises(CommandError, match=f"output={output} is a folder"):
        predict.predict(predict.Settings(None, None, output), console)


def test_output_that_cannot_be_written_is_named(trained, unlabelled, tmp_path, console):
    (tmp_path / "file").write_text("")
    output = tmp_path / "file" / "submission.csv"
    with pytest.raises(CommandError, match=f"output={output}: "):
        predict.predict(predict.Settings(trained, unlabelled, output), console)


@pytest.mark.parametrize("columns", [("id", "id"), ("a", "b", "c")])
def test_columns_are_two(columns):
    with pytest.raises(ValueError, match="columns=.* must be two different headings"):
        predict.Settings(None, None, columns=columns)
