"""A run's network as files, which other programs read."""

import csv
import dataclasses
import importlib.util
import io
import json
import re
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
import safetensors.torch
import torch
import yaml
from commands import environment
from flax import nnx
from PIL import Image
from rich.console import Console

from chansel_jax.errors import OneLineError
from chansel_jax.networks.resnet import ResNet
from chansel_jax.torch_weights import save_safetensors
from experiments import export, predict
from experiments.cli.errors import CommandError
from experiments.exporting import formats
from experiments.exporting.card import figures
from experiments.pytorch.networks import torch_twin
from experiments.studies.runs import record_of
from experiments.training.load import load_run
from experiments.training.settings import NetworkSettings, Settings, network_config

RELOADED = """
import sys
sys.modules["chansel_jax"] = sys.modules["flax"] = None  # as if they were not installed
import numpy as np
images = np.load("images.npy")
exec(open("code.py").read())
np.save("probabilities.npy", probabilities)
"""


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture(scope="module")
def exported(settings, whole, tmp_path_factory):
    """The folder of the files, and what was printed."""
    console, folder = Console(file=io.StringIO(), width=200), tmp_path_factory.mktemp("export")
    export.export(export.Settings(settings.workdir, output=folder), console)
    return folder, console.file.getvalue()


@pytest.fixture(scope="module")
def predicted(settings, whole, images, tmp_path_factory):
    """The validation images, and the probabilities that `predict` writes for them."""
    root = tmp_path_factory.mktemp("predicted")
    output, folder = root / "probabilities.csv", images / "validation"
    wanted = predict.Settings(settings.workdir, folder, output, probabilities=True)
    predict.predict(wanted, Console(file=io.StringIO()))
    with output.open() as file:
        _, *rows = csv.reader(file)
    arrays = [np.asarray(Image.open(folder / f"{row[0]}.png")) for row in rows]
    return np.stack(arrays), np.array([row[1:] for row in rows], float)


def code(folder, file):
    """What the model card says of how to load a file."""
    text = (folder / "README.md").read_text()
    return re.search(rf"## {file}\n.*?```python\n(.*?)```", text, re.DOTALL)[1]


def assert_predicts(probabilities, expected):
    # The file of `predict` has six digits behind the point.
    np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-5)


def test_program_runs_where_neither_this_nor_flax_is(exported, predicted, tmp_path):
    folder, _ = exported
    (tmp_path / "model.stablehlo").write_bytes((folder / "model.stablehlo").read_bytes())
    (tmp_path / "code.py").write_text(code(folder, "model.stablehlo"))
    np.save(tmp_path / "images.npy", predicted[0])
    subprocess.run(
        [sys.executable, "-c", RELOADED],
        check=True,
        cwd=tmp_path,
        env=environment(1),
        timeout=120,
    )
    assert_predicts(np.load(tmp_path / "probabilities.npy"), predicted[1])


@pytest.mark.parametrize("count", [1, 5, 27])
def test_onnx_predicts_what_predict_writes(exported, predicted, count):
    folder, (images, expected) = exported[0], predicted
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [(given.name, given.type) for given in session.get_inputs()] == [
        ("images", "tensor(uint8)")
    ]
    (found,) = session.run(["probabilities"], {"images": images[:count]})
    assert_predicts(found, expected[:count])
    named = session.get_modelmeta().custom_metadata_map["class_names"]
    assert json.loads(named) == ["blue", "green", "red"]


@pytest.mark.parametrize("file", ["model.safetensors", "model.onnx"])
def test_code_of_the_card_predicts_what_predict_writes(exported, predicted, monkeypatch, file):
    folder, (images, expected) = exported[0], predicted
    monkeypatch.chdir(folder)
    namespace = {"images": images}
    exec(code(folder, file), namespace)
    assert_predicts(namespace["probabilities"], expected)


def test_pytorch_reads_the_parameters(exported, predicted, settings):
    folder, (images, expected) = exported[0], predicted
    run = load_run(settings.workdir)
    twin = torch_twin(settings.conv, run.network.config)
    twin.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
    x = torch.from_numpy((images - run.mean) / run.std).permute(0, 3, 1, 2)
    with torch.no_grad():
        assert_predicts(torch.softmax(twin.eval()(x), 1).numpy(), expected)


def test_card_and_what_is_printed(exported, settings, whole):
    folder, text = exported
    summary, _ = whole
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "model.onnx", "model.safetensors", "model.stablehlo"),
    ]
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(front)
    assert head["pipeline_tag"] == "image-classification"
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"] == [
        {"type": "accuracy", "value": summary["val_accuracy_at_best"]},
        {"type": "loss", "value": summary["best_val_loss"]},
    ]
    assert f"| parameters | {summary['parameters']:,} |" in body
    for name in formats.FORMATS.values():
        assert f"{folder / name.file}: {(folder / name.file).stat().st_size:,} bytes" in text
        assert code(folder, name.file).splitlines()[-1] in text


def test_card_has_no_figures_of_other_test_images(settings, whole):
    run, record = load_run(settings.workdir), record_of(settings.workdir)
    measured = {"epoch": run.epoch, "images_sha256": "a", "loss": 0.5, "accuracy": 0.75}
    data = {**record.data, "digests": {**record.data["digests"], "test": "a"}}
    own = dataclasses.replace(record, evaluations={"test": measured}, data=data)
    assert figures(run, own)["test"]["accuracy"] == 0.75
    for changed in ({"images_sha256": "b"}, {"epoch": run.epoch + 1}):
        others = dataclasses.replace(own, evaluations={"test": measured | changed})
        assert "test" not in figures(run, others)


def test_code_of_the_card_builds_the_network_of_the_settings():
    network = NetworkSettings(blocks=(1,), width=4, share=0.5, norm=True, input_norm=True)
    settings = Settings(conv="subspace", network=network)
    config = network_config(settings, 3)
    built = types.SimpleNamespace(config=config)
    run = types.SimpleNamespace(
        settings=settings, network=built, class_names="abc", mean=[0.5], std=[0.25]
    )
    code, _ = formats.code("safetensors", run).split("load_safetensors(network")

    def network_of_code():
        exec(code, namespace := {})
        return namespace["network"]

    found = nnx.eval_shape(network_of_code).config
    assert dataclasses.replace(found, conv=config.conv) == config
    assert found.conv.func is config.conv.func and found.conv.keywords == config.conv.keywords


def test_run_in_bfloat16_is_exported_in_float32(settings, whole):
    run = load_run(settings.workdir)
    config = dataclasses.replace(run.network.config, dtype=jnp.bfloat16)
    network = ResNet(config, rngs=nnx.Rngs(1))
    nnx.update(network, nnx.state(run.network))
    wide = formats.in_float32(dataclasses.replace(run, network=network)).network
    images = np.zeros((2, *run.image_shape), np.uint8)
    narrow, found, expected = (
        formats.predict_of(run, each)(images) for each in (network, wide, run.network)
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-7)
    assert np.abs(narrow - expected).max() > 1e-7
    predicts = [formats.predict_of(run, each) for each in (network, wide)]
    assert export.predictions_differ(*predicts, run) > 1e-7


# What is refused


def exporting(settings, output, *names):
    return export.Settings(settings.workdir, format=names or ("safetensors",), output=output)


def test_unfinished_run(settings, whole, tmp_path, console):
    subprocess.run(["cp", "-r", str(settings.workdir), str(tmp_path / "run")], check=True)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(CommandError, match=f"workdir={tmp_path}/run holds a run that is not fin"):
        export.export(export.Settings(tmp_path / "run"), console)
    assert not (tmp_path / "run" / "export").exists()


def test_file_that_cannot_be_written(settings, whole, tmp_path, console):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CommandError, match="model.safetensors is a folder"):
        export.export(exporting(settings, tmp_path), console)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("linked", [False, True])
def test_readme_that_is_no_card_is_not_replaced(settings, whole, tmp_path, console, linked):
    (tmp_path / "mine.md").write_text("# Mine\n")
    output = tmp_path / "output"
    output.mkdir()
    card = output / "README.md"
    if linked:
        card.symlink_to(tmp_path / "mine.md")
    else:
        (tmp_path / "mine.md").rename(card)
    with pytest.raises(CommandError, match=f"^{card} is no model card of an earlier export"):
        export.export(exporting(settings, output), console)
    assert card.read_text() == "# Mine\n" and list(output.iterdir()) == [card]


def test_package_that_is_missing_is_named_before_anything_is_read(tmp_path, console, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name)
    )
    with pytest.raises(CommandError, match="^format=onnx needs the package onnxscript, .*export"):
        export.export(export.Settings(tmp_path), console)


def test_file_that_predicts_something_else_is_not_kept(
    settings, whole, tmp_path, console, monkeypatch
):
    def save(run, path):
        other = nnx.clone(run.network)
        other.classifier.bias[...] += np.array([1e-3, 0, 0], np.float32)
        save_safetensors(other, path)

    changed = formats.FORMATS["safetensors"]._replace(save=save)
    monkeypatch.setitem(formats.FORMATS, "safetensors", changed)
    (tmp_path / "model.safetensors").write_text("an older file")
    with pytest.raises(OneLineError, match="^format=safetensors: the file's probabilities differ"):
        export.export(exporting(settings, tmp_path), console)
    assert (tmp_path / "model.safetensors").read_text() == "an older file"
