"""The benchmark as a whole: real workers, tiny shapes."""

import dataclasses
import io
import json
import os
import shlex

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from chansel_jax.counting import count_network
from chansel_jax.errors import OneLineError
from chansel_jax.networks.resnet import PRESETS
from experiments import benchmark
from experiments.benchmarking import plan, survey
from experiments.benchmarking.ceilings import Effort
from experiments.benchmarking.settings import ImageSettings, Settings
from experiments.cli.flags import parse

TINY = {"batch_size": 4, "rounds": 2, "round_seconds": 1e-3}


@pytest.fixture(autouse=True, scope="module")
def little_effort():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(survey.EFFORTS, "cpu", Effort(2**16, 64, 0.01))
        yield


@pytest.fixture(scope="module")
def surveyed_once(forked_workers):
    return survey.survey(Settings(dtypes=("float32", "bfloat16")), Console(file=io.StringIO()))


@pytest.fixture
def surveyed(surveyed_once, monkeypatch):
    """Has benchmarks survey the machine, which takes two processes, no more than once."""

    def taken(settings, _):
        machine = plan.make_machine(settings, "cpu", surveyed_once.machine.threads)
        return dataclasses.replace(surveyed_once, machine=machine)

    monkeypatch.setattr(benchmark, "survey", taken)


def run(settings):
    """The results, and what was printed."""
    console = Console(file=io.StringIO(), width=120, markup=False)
    results = benchmark.benchmark(settings, console)
    return results, console.file.getvalue()


def test_networks_of_several_widths_are_compared_with_one(surveyed, tmp_path):
    settings = Settings(
        **TINY,
        what="forward",
        image_size=8,
        convs=("subkernel", "chansel-w3"),
        lowerings=("auto",),
        torch=("eager",),
        output=tmp_path / "results",
    )
    results, printed = run(settings)
    (case,) = results["cases"]
    names = {each["name"] for each in case["contestants"]}
    assert names == {
        f"{framework} {conv} {variant}"
        for framework, variant in (("JAX", "auto"), ("PyTorch", "eager"))
        for conv in settings.convs
    }
    assert case["work"]["subkernel"]["parameters"] == 174_787
    narrow = sum(
        row.parameters
        for row in count_network(dataclasses.replace(PRESETS["resnet14"], width=3), 32)
    )
    assert case["work"]["chansel-w3"]["parameters"] == narrow < 27_363
    assert "JAX chansel-w3 auto / JAX subkernel auto" in printed


def test_step_is_compared_timed_and_written(surveyed, tmp_path):
    settings = Settings(
        **TINY,
        image_size=8,
        convs=("chansel",),
        lowerings=("grouped",),
        torch=("eager", "max_autotune"),
        output=tmp_path / "results",
    )
    results, printed = run(settings)
    assert json.loads((tmp_path / "results" / "results.json").read_text()) == json.loads(
        json.dumps(results)
    )
    (case,) = results["cases"]
    names = {each["name"] for each in case["contestants"]}
    assert names == {"JAX chansel grouped", "PyTorch chansel eager"}
    for each in case["contestants"]:
        assert len(each["rounds"]) == 2 and min(each["rounds"]) > 0
        assert each["seconds"]["p5"] <= each["seconds"]["median"] <= each["seconds"]["p95"]
        assert (each["compile_seconds"] is None) == (each["framework"] == "PyTorch")
        assert each["peak_memory_bytes"] > 10**7
        assert 0 <= each["tolerance_needed"] <= 1
    # JAX's was compared with PyTorch's, not each with itself.
    assert sum(each["tolerance_needed"] > 0 for each in case["contestants"]) == 1
    (failure,) = case["could_not_run"]
    assert failure["name"] == "PyTorch chansel max_autotune"
    assert len(case["ratios"]) == 1
    assert results["machine"]["threads"] >= 1 and results["versions"]["jax"]
    text = (tmp_path / "results" / "results.md").read_text()
    assert all(f"| {name} | " in text for name in names) and results["command"] in text
    assert f"XLA_FLAGS={shlex.quote(os.environ['XLA_FLAGS'])} " in results["command"]
    with Image.open(tmp_path / "results" / "chart.png") as picture:
        picture.load()
        assert picture.format == "PNG"
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "chart.png",
        "results.json",
        "results.md",
    ]
    assert "CUDA graphs exist on GPUs only" in printed


def test_layers_forward_and_backward_in_bfloat16(surveyed, tmp_path):
    settings = Settings(
        **TINY,
        what="layer",
        shapes=("6x8x4x3x2",),
        dtypes=("bfloat16",),
        convs=("chansel",),
        lowerings=("auto",),
        torch=("channels_last",),
        output=tmp_path,
    )
    results, printed = run(settings)
    assert [(case["backward"], len(case["contestants"])) for case in results["cases"]] == [
        (False, 2),
        (True, 2),
    ]
    assert not any(case["could_not_run"] for case in results["cases"])
    took = {each["took"] for case in results["cases"] for each in case["contestants"]}
    assert None in took and len(took) == 2 and took - {None} <= {"native", "shifted"}
    assert "Lowerings that auto takes" in printed and "GMAC/s forward" in printed


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A folder of noise: two classes of 12 images."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "cache"))
    return tmp_path / "images"


def test_epochs_with_their_data_on_two_devices(surveyed, images, tmp_path):
    settings = Settings(
        what="epoch",
        images=ImageSettings(dataset="folder", data_dir=images),
        batch_size=8,
        runs=2,
        epochs=1,
        convs=("subkernel",),
        torch=("channels_last",),
        cpu_devices=2,
        output=tmp_path / "results",
    )
    results, printed = run(settings)
    (case,) = results["cases"]
    assert (case["image_size"], case["num_classes"]) == (8, 2)
    assert {each["name"] for each in case["contestants"]} == {
        "JAX subkernel auto",
        "PyTorch subkernel channels_last",
    }
    for each in case["contestants"]:
        assert each["epoch"]["run_seconds"] == each["rounds"]
        # Two whole batches of 8 of the 20 or so training images.
        assert each["images_per_second"] == pytest.approx(16 / each["seconds"]["median"])
    assert "2 runs of 1 epochs" in printed
    assert str(images) not in json.dumps(results["images"])


def test_mismatch_ends_the_benchmark(surveyed, monkeypatch, tmp_path):
    whole = plan.make_tasks

    def corrupted(*arguments):
        first, *others = whole(*arguments)
        weights = dict(first.weights)
        weights["layer2.0.bn1.running_mean"] = weights["layer2.0.bn1.running_mean"] + 0.1
        return [dataclasses.replace(first, weights=weights), *others]

    monkeypatch.setattr(plan, "make_tasks", corrupted)
    settings = Settings(
        **TINY,
        what="forward",
        image_size=8,
        convs=("chansel",),
        lowerings=("grouped",),
        torch=("eager",),
        output=tmp_path,
    )
    named = "JAX chansel grouped and PyTorch chansel eager differ in logits"
    with pytest.raises(OneLineError, match=named):
        run(settings)
    assert not list(tmp_path.iterdir())


def test_without_pytorch_jax_is_timed_alone(forked_workers, monkeypatch, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    settings = Settings(
        batch_size=4,
        rounds=1,
        round_seconds=1e-3,
        what="layer",
        shapes=("6x8x4x3x2",),
        convs=("chansel",),
        lowerings=("shifted",),
        output=tmp_path / "results",
    )
    results, printed = run(settings)
    assert 'to install it: pip install -e ".[torch]"' in " ".join(printed.split())
    assert {each["name"] for each in results["cases"][0]["contestants"]} == {"JAX chansel shifted"}
    assert list(results["machine"]["runtimes"]) == ["JAX"]


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, "benchmark", ["--help"])
    told = capsys.readouterr().out
    for field in dataclasses.fields(Settings):
        if field.name != "images":
            assert f"--{field.name.replace('_', '-')}" in told
