"""What a benchmark derives without running anything: plans, work, comparisons, figures, reports."""

import dataclasses
import io
import shlex
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from rich.console import Console

from chansel_jax.data import DATASETS
from chansel_jax.networks.resnet import CONVS, PRESETS
from chansel_jax.torch_weights import from_torch, to_numpy
from chansel_jax.training.augmentation import Augmentation
from experiments.benchmark import default_output
from experiments.benchmarking import chart, comparison, plan, report, results, settings
from experiments.benchmarking.cases import (
    Case,
    Contestant,
    Dtype,
    LayerShape,
    Machine,
    Recipe,
    TorchVariant,
    TrainImages,
    image_batch,
    layer_batch,
)
from experiments.benchmarking.ceilings import Ceilings, best, best_rate
from experiments.benchmarking.comparison import MismatchError, check_outputs
from experiments.benchmarking.contestants import jax_side, torch_side
from experiments.benchmarking.contestants.weights import network_weights, uninitialised
from experiments.benchmarking.rounds import CaseResult, Schedule, Timing, steps_per_round
from experiments.benchmarking.settings import ImageSettings, Settings, parse_shape
from experiments.benchmarking.survey import Survey
from experiments.benchmarking.work import Work, work_of
from experiments.cli.flags import parse, typed
from experiments.pytorch.networks import TorchResNet, torch_twin
from experiments.pytorch.pipeline import AugmentedImages

CPU, GPU = Machine("cpu", 2), Machine("gpu", 16)
STEP = Case("step", "resnet14", 4, 32, 3, "float32")
LAYER = dataclasses.replace(STEP, what="layer", layer=LayerShape(8, 4, 6, 3, 2))
AUTO = Contestant("JAX", "chansel", "auto")
GROUPED = Contestant("JAX", "chansel", "grouped")
DENSE = Contestant("JAX", "subkernel", "auto")
LAX = Contestant("JAX", "subkernel", "lax")
EAGER = Contestant("PyTorch", "chansel", "eager")
CHANNELS_LAST = Contestant("PyTorch", "chansel", "channels_last")
TORCH_DENSE = Contestant("PyTorch", "subkernel", "eager")
EIGHT_IMAGES = TrainImages(
    np.zeros((8, 6, 6, 3), np.uint8), np.arange(8, dtype=np.int32), mean=None, std=None
)
CEILINGS = Ceilings(1e9, {"float32": 1e9, "tf32": 2e9, "bfloat16": 4e9})


def timing(contestant, *seconds, took=None):
    return Timing(contestant, seconds, 1, None, 10**6, 0.0, took)


# Settings


@pytest.mark.parametrize(
    "given, message",
    [
        ({"what": "layer", "runs": 3}, "runs=3 .* what=layer, only with epoch"),
        ({"loader_workers": 0}, "loader_workers=0 .* what=step, only with epoch"),
        (
            {"images": ImageSettings(dataset="folder", classes=("a", "b"))},
            "dataset=folder, classes=a,b .* what=step, only with epoch",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Settings(**given)


def test_every_lowering_of_the_library_is_taken():
    names = ("auto", "composed", "grouped", "shifted", "native", "composed_native", "lax")
    assert Settings(lowerings=names).lowerings


@pytest.mark.parametrize(
    "settings_type, name, choices",
    [(ImageSettings, "dataset", DATASETS), (Settings, "model", tuple(PRESETS))],
)
def test_choices_are_those_of_the_library(settings_type, name, choices):
    assert get_args(settings_type.__annotations__[name]) == choices


def test_shape_is_read():
    assert parse_shape("32x16x24x3x2") == LayerShape(32, 16, 24, 3, 2)


@pytest.mark.parametrize("text", ["32x16x16x3", "32x16x16x3x0", "axbxcxdxe", "1x2x2x4x1x1", ""])
def test_wrong_shape_is_named(text):
    with pytest.raises(ValueError, match=f"shapes={text} must be {settings.SHAPE_FORMAT}"):
        Settings(shapes=(text,))


@pytest.mark.parametrize("text", ["56x56x64x128x2", "2x8x8x3x1"])
def test_kernel_larger_than_the_image_is_refused(text):
    kernel, size = text.split("x")[3], text.split("x")[0]
    told = f"shapes={text}: the kernel of {kernel} × {kernel} .* image of {size} × {size}"
    with pytest.raises(ValueError, match=told):
        Settings(what="layer", shapes=(text,))


def test_command_gives_the_same_settings():
    given = Settings(
        images=ImageSettings(dataset="folder", classes=("cat", "big dog")),
        what="epoch",
        lowerings=("grouped",),
        torch=(),
        dtypes=("float32", "bfloat16"),
        round_seconds=0.5,
    )
    words = typed("benchmark", given)
    assert words.startswith("python -m experiments.benchmark ")
    assert parse(Settings, "benchmark", shlex.split(words)[3:]) == given
    assert typed("benchmark", Settings()) == "python -m experiments.benchmark"


def test_command_names_no_folder_of_this_machine():
    images = ImageSettings(data_dir=Path("/home/me/images"))
    given = Settings(what="epoch", images=images, output=Path("out"))
    assert (
        typed("benchmark", given) == "python -m experiments.benchmark --what=epoch --data-dir=PATH"
    )


# Plans


@pytest.mark.parametrize(
    ("asked", "platform", "cores", "workers"),
    [
        (None, "cpu", 2, 0),
        (None, "gpu", 4, 4),
        (None, "gpu", 64, 8),
        (3, "cpu", 2, 3),
        (0, "gpu", 4, 0),
    ],
)
def test_processes_that_load_batches(asked, platform, cores, workers):
    made = plan.make_machine(Settings(what="epoch", loader_workers=asked), platform, cores)
    assert (made.loader_workers, made.threads) == (workers, cores)


def test_layers_are_those_of_resnet14():
    assert plan.model_shapes(STEP) == [
        LayerShape(32, 16, 16, 3, 1),
        LayerShape(32, 16, 32, 3, 2),
        LayerShape(16, 32, 32, 3, 1),
        LayerShape(32, 16, 32, 1, 2),
        LayerShape(16, 32, 64, 3, 2),
        LayerShape(8, 64, 64, 3, 1),
        LayerShape(16, 32, 64, 1, 2),
    ]


def test_layers_of_resnet18_begin_with_its_stem_and_fit_each_other():
    case = dataclasses.replace(STEP, model="resnet18", image_size=224)
    shapes = plan.model_shapes(case)
    assert shapes[0] == LayerShape(224, 3, 64, 7, 2)
    assert shapes[1] == LayerShape(56, 64, 64, 3, 1)
    assert shapes[-2] == LayerShape(7, 512, 512, 3, 1)
    assert len(shapes) == 11


def test_first_of_each_convolution_is_pytorchs_eager_one():
    contestants = plan.make_contestants(Settings(), CPU, has_torch=True)
    for conv in ("chansel", "subkernel"):
        assert [c for c in contestants if c.conv == conv][0].variant == "eager"
        lowerings = [c.variant for c in contestants if (c.framework, c.conv) == ("JAX", conv)]
        assert tuple(lowerings) == CONVS[conv].LOWERINGS
    assert not any(c.variant == "max_autotune" for c in contestants)
    assert len(set(contestants)) == len(contestants)


def test_gpu_has_cuda_graphs_and_all_dtypes():
    contestants = plan.make_contestants(Settings(torch=None), GPU, has_torch=True)
    torch_variants = [c.variant for c in contestants if c.framework == "PyTorch"]
    assert set(torch_variants) == set(get_args(TorchVariant))
    assert plan.make_dtypes(Settings(), GPU) == get_args(Dtype)
    assert plan.make_dtypes(Settings(), CPU) == ("float32",)


def test_contestants_are_those_asked_for():
    chosen = Settings(lowerings=("grouped",), torch=("channels_last",), convs=("chansel",))
    assert plan.make_contestants(chosen, CPU, has_torch=True) == [CHANNELS_LAST, GROUPED]
    assert plan.make_contestants(chosen, CPU, has_torch=False) == [GROUPED]
    with pytest.raises(plan.PlanError, match="nothing to time"):
        nothing = dataclasses.replace(chosen, lowerings=())
        plan.make_contestants(nothing, CPU, has_torch=False)
    both = Settings(lowerings=("grouped", "native"), torch=())
    names = [c.name for c in plan.make_contestants(both, CPU, has_torch=True)]
    assert names == ["JAX chansel grouped", "JAX chansel native", "JAX subkernel native"]
    one = Settings(lowerings=("grouped",), torch=())
    assert plan.make_contestants(one, CPU, has_torch=True) == [GROUPED, DENSE]
    other = Settings(lowerings=("lax",), torch=())
    assert plan.make_contestants(other, GPU, has_torch=True) == [AUTO, LAX]


def test_epoch_by_default_takes_the_default_lowering_alone():
    contestants = plan.make_contestants(Settings(what="epoch"), CPU, has_torch=False)
    assert contestants == [AUTO, DENSE]


def test_what_does_not_fit_the_machine_is_named():
    with pytest.raises(plan.PlanError, match="batch_size=5 must be divisible by cpu_devices=2"):
        plan.make_cases(Settings(batch_size=5), Machine("cpu", 2, cpu_devices=2), None)
    with pytest.raises(plan.PlanError, match="batch_size=9 must be at most the 8 training images"):
        plan.make_cases(Settings(what="epoch", batch_size=9), CPU, EIGHT_IMAGES)


def test_cases_take_sizes_from_model_device_and_data():
    (case,) = plan.make_cases(Settings(model="resnet18"), CPU, None)
    assert (case.batch_size, case.image_size, case.num_classes) == (16, 224, 1000)
    (case,) = plan.make_cases(Settings(what="epoch", batch_size=4), CPU, EIGHT_IMAGES)
    assert (case.image_size, case.num_classes) == (6, 8)


def test_layers_are_timed_forward_then_with_backward():
    chosen = Settings(what="layer", shapes=("8x4x6x3x1", "8x4x6x1x2"))
    cases = plan.make_cases(chosen, CPU, None)
    assert [(case.backward, case.layer.kernel_size) for case in cases] == [
        (False, 3),
        (False, 1),
        (True, 3),
        (True, 1),
    ]


def test_default_folder_is_named_after_what_model_and_device():
    surveyed = Survey(GPU, "NVIDIA H100 80GB HBM3", {}, None, CEILINGS)
    assert str(default_output(Settings(), surveyed)) == (
        "benchmarks/step-resnet14-nvidia-h100-80gb-hbm3"
    )
    surveyed = Survey(CPU, "Some CPU @ 3 GHz", {}, None, CEILINGS)
    assert str(default_output(Settings(what="layer"), surveyed)) == "benchmarks/layer-resnet14-cpu"


# What all contestants share


def test_batches_follow_from_the_seed():
    for batch in (image_batch, layer_batch):
        first, again = batch(LAYER), batch(LAYER)
        other = batch(dataclasses.replace(LAYER, seed=1))
        np.testing.assert_array_equal(first[0], again[0])
        assert not np.array_equal(first[0], other[0])
    x, dy = layer_batch(LAYER)
    assert (x.shape, dy.shape) == ((4, 8, 8, 4), (4, 4, 4, 6))


def test_no_weights_of_a_network_are_zero_or_alike(monkeypatch):
    monkeypatch.setitem(
        PRESETS, "resnet14", dataclasses.replace(PRESETS["resnet14"], blocks=(1, 1))
    )
    weights = network_weights(STEP, "chansel")
    twin = TorchResNet("chansel", num_classes=3, **plan.torch_network(STEP, "chansel"))
    shapes = {name: a.shape for name, a in twin.state_dict().items()}
    assert {name: array.shape for name, array in weights.items()} == {
        name: tuple(shape) for name, shape in shapes.items() if "num_batches" not in name
    }
    for name, array in weights.items():
        assert array.dtype == np.float32
        if array.ndim == 1:
            assert len(np.unique(array)) == array.size
        if name.endswith("running_var"):
            assert (array > 0).all()


def test_optimisers_update_alike():
    recipe = Recipe(learning_rate=0.01, weight_decay=0.1)
    network = uninitialised(dataclasses.replace(PRESETS["resnet14"], blocks=(1,), width=4))
    twin = torch_twin("chansel", network.config)
    from_torch(network, twin.state_dict())
    optimizer = jax_side.make_adamw(recipe)
    graph, params, rest = nnx.split(network, nnx.Param, ...)
    params = nnx.to_pure_dict(params)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape, np.float32)), params
    )
    state, torch_optimizer = optimizer.init(params), torch_side.make_adamw(twin, recipe)
    by_name = to_numpy(nnx.merge(graph, gradients, rest))
    for name, parameter in twin.named_parameters():
        parameter.grad = torch.from_numpy(by_name[name])
    for _ in range(3):
        updates, state = jax.jit(optimizer.update)(gradients, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        torch_optimizer.step()
    expected = to_numpy(nnx.merge(graph, params, rest))
    for name, parameter in twin.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), expected[name], rtol=1e-4, atol=1e-6)


def test_loader_crops_and_mirrors_as_the_library_does():
    image = np.arange(1, 3 * 3 * 3 + 1, dtype=np.uint8).reshape(1, 3, 3, 3)
    torch.manual_seed(0)
    images, labels = AugmentedImages(image, np.array([5], np.int32)).__getitems__([0] * 400)
    assert (images.shape, images.dtype) == ((400, 3, 3, 3), torch.uint8)
    assert labels.tolist() == [5] * 400
    padded = np.pad(image[0], ((4, 4), (4, 4), (0, 0)))
    crops = [padded[i : i + 3, j : j + 3] for i in range(9) for j in range(9)]
    expected = {crop.tobytes() for each in crops for crop in (each, each[:, ::-1])}
    assert {np.ascontiguousarray(x.permute(1, 2, 0)).tobytes() for x in images} <= expected
    whole = [each.tobytes() for each in (image[0], image[0][:, ::-1])]
    got = [np.ascontiguousarray(x.permute(1, 2, 0)).tobytes() for x in images]
    assert len(set(got)) > 40 and all(got.count(each) for each in whole)
    assert Augmentation().crop_padding == 4 and Augmentation().flip


# Comparison


def test_equal_outputs_need_no_tolerance():
    outputs = {"logits": np.ones((2, 3))}
    assert check_outputs(STEP, {EAGER: outputs, AUTO: outputs}) == {EAGER: 0, AUTO: 0}


def test_outputs_within_the_tolerance_pass_and_say_how_close_it_was():
    near = {"logits": np.full(4, 1 + 0.5e-4)}
    needed = check_outputs(STEP, {EAGER: {"logits": np.ones(4)}, AUTO: near})
    assert needed[AUTO] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("value", [1.001, np.nan])
def test_outputs_that_differ_are_named(value):
    outputs = {EAGER: {"logits": np.ones(4)}, GROUPED: {"logits": np.full(4, value)}}
    with pytest.raises(MismatchError, match="JAX chansel grouped and PyTorch chansel eager") as got:
        check_outputs(STEP, outputs)
    assert "differ in logits" in str(got.value)


def test_shapes_and_names_must_be_alike():
    with pytest.raises(MismatchError, match="logits"):
        check_outputs(STEP, {EAGER: {"logits": np.ones(4)}, AUTO: {"logits": np.ones(1)}})
    with pytest.raises(MismatchError, match="differ in outputs"):
        check_outputs(STEP, {EAGER: {"logits": np.ones(4)}, AUTO: {"loss": np.ones(4)}})


def test_convolutions_are_not_compared_with_each_other():
    outputs = {EAGER: {"logits": np.ones(4)}, DENSE: {"logits": np.zeros(4)}}
    assert check_outputs(STEP, outputs) == {EAGER: 0, DENSE: 0}


def test_gradient_that_is_all_rounding_is_compared_on_the_scale_of_the_others():
    expected = {"gradient of a": np.array([3.0, 4.0]), "gradient of b": np.array([1e-9])}
    actual = {"gradient of a": np.array([3.0, 4.5]), "gradient of b": np.array([-1e-9])}
    differences = comparison.relative_differences(actual, expected)
    assert differences["gradient of a"] == pytest.approx(0.1)
    assert differences["gradient of b"] == pytest.approx(2e-9 / 0.05)


def test_gradients_of_one_layer_are_as_exact_as_its_output():
    assert comparison.tolerance(LAYER, "gradient of weight") == 1e-4
    assert comparison.tolerance(STEP, "gradient of fc.weight") > 1e-3


# Work


def test_work_of_a_layer_by_hand():
    # 8 × 8 × 4 to 4 × 4 × 6, K = 9: pointwise 64 · 24, depthwise 16 · 54; dense 16 · 4 · 6 · 9.
    elements = 8 * 8 * 4 + 4 * 4 * 6
    assert work_of(LAYER, "chansel") == Work(78, 4 * 2400, 4 * (4 * elements + 78))
    assert work_of(LAYER, "subkernel") == Work(216, 4 * 3456, 4 * (4 * elements + 216))
    backward = dataclasses.replace(LAYER, backward=True, dtype="bfloat16")
    assert work_of(backward, "chansel") == Work(78, 3 * 4 * 2400, 3 * (2 * 4 * elements + 4 * 78))


def test_work_of_a_network_is_three_times_as_much_in_training():
    forward = work_of(dataclasses.replace(STEP, what="forward"), "chansel")
    step = work_of(STEP, "chansel")
    assert (forward.parameters, forward.multiply_adds) == (27_363, 4 * 6_205_632)
    assert step.multiply_adds == 3 * forward.multiply_adds
    parameter_bytes = 4 * 27_363
    assert step.bytes_moved - 10 * parameter_bytes == 3 * (forward.bytes_moved - parameter_bytes)


# Figures


def test_percentiles_by_hand():
    assert results.spread([3.0, 1.0, 2.0]) == pytest.approx({"median": 2, "p5": 1.1, "p95": 2.9})


def test_ratio_is_taken_round_by_round():
    # The ratio of the medians would be 1.
    found = results.ratio(timing(AUTO, 1.0, 2.0, 4.0), timing(DENSE, 2.0, 1.0, 4.0))
    assert found["median"] == 1 and found["p5"] == pytest.approx(0.55)
    found = results.ratio(timing(AUTO, 1.0, 2.0, 9.0), timing(DENSE, 2.0, 8.0, 3.0))
    assert found["median"] == 0.5


def test_ratios_take_the_default_lowering_and_pytorchs_fastest():
    timings = [
        timing(AUTO, 4.0, 4.0),
        timing(GROUPED, 2.0, 2.0),
        timing(DENSE, 8.0, 8.0),
        timing(LAX, 32.0, 32.0),
        timing(EAGER, 5.0, 5.0),
        timing(CHANNELS_LAST, 1.0, 1.0),
        timing(TORCH_DENSE, 16.0, 16.0),
    ]
    found = {r["name"]: (r["denominator"], r["median"]) for r in results.ratios(timings, "auto")}
    assert found == {
        "JAX chansel auto / fastest JAX subkernel": (DENSE.name, 0.5),
        "JAX chansel auto / JAX subkernel lax": (LAX.name, 0.125),
        "JAX chansel auto / fastest PyTorch chansel": (CHANNELS_LAST.name, 4),
        "JAX chansel auto / fastest PyTorch subkernel": (TORCH_DENSE.name, 1 / 4),
        "JAX chansel auto / JAX chansel grouped": (GROUPED.name, 2),
        "fastest JAX subkernel / fastest PyTorch subkernel": (TORCH_DENSE.name, 0.5),
        "PyTorch chansel / subkernel, fastest each": (TORCH_DENSE.name, 1 / 16),
    }
    assert results.ratios(timings[:1], "auto") == []
    lax_alone = results.ratios([timings[0], timing(LAX, 32.0, 32.0)], "auto")
    assert [r["name"] for r in lax_alone] == ["JAX chansel auto / fastest JAX subkernel"]


def test_epochs_by_hand():
    found = results.epoch_figures([1.0, 3.0, 5.0, 7.0], runs=2)
    assert found == {"run_seconds": [4, 12], "mean": 4, "std": pytest.approx(8**0.5)}
    assert results.epoch_figures([1.0, 3.0], runs=1)["std"] is None


def test_contestant_is_measured_against_the_ceilings():
    works = {"chansel": Work(1, multiply_adds=1_000_000, bytes_moved=3_000_000)}
    found = results.contestant_figures(STEP, timing(AUTO, 0.01), works, CEILINGS, steps=1)
    assert found["images_per_second"] == pytest.approx(400)
    assert found["multiply_adds_per_second"] == pytest.approx(1e8)
    assert found["of_product_ceiling"] == pytest.approx(0.1)
    assert found["of_copy_ceiling"] == pytest.approx(0.3)
    assert found["bound"] == "memory"
    epoch = results.contestant_figures(STEP, timing(AUTO, 0.1), works, CEILINGS, steps=10)
    assert epoch["images_per_second"] == pytest.approx(400)


def test_steps_fill_a_round():
    schedule = Schedule(3, round_seconds=0.2)
    assert [steps_per_round(s, schedule) for s in (3.0, 0.02, 1e-9)] == [1, 10, 1000]
    assert steps_per_round(0.001, Schedule(3)) == 1


def test_best_ceiling_of_each_kind_counts():
    first, second = Ceilings(1, {"float32": 5}), Ceilings(2, {"float32": 4})
    assert best([first, second]) == Ceilings(2, {"float32": 5})
    assert best_rate(10, lambda: None, 0.001) > 1000


# Reports


def some_results(what="step", cases=None, took=None):
    works = {conv: Work(1, 10**6, 10**6) for conv in ("chansel", "subkernel")}
    timings = (
        timing(AUTO, 0.001, 0.002, took=took),
        timing(DENSE, 0.004, 0.004),
        timing(EAGER, 0.5, 0.5),
    )
    schedule = Schedule(1, runs=2)
    failures = {GROUPED: "RuntimeError: [no] compiler"}
    return {
        **dataclasses.asdict(Settings(what=what)),
        "command": "python -m experiments.benchmark --rounds=2",
        "date": "2030-01-02T03:04:05+00:00",
        "machine": {**dataclasses.asdict(CPU), "device": "Some CPU", "busy_before": 0.5},
        "versions": {"python": "3.11.1", "jax": "0.10"},
        "ceilings": dataclasses.asdict(CEILINGS),
        "cases": [
            results.case_figures(
                CaseResult(case, timings, failures),
                works,
                CEILINGS,
                schedule,
                "auto",
                3 if what == "epoch" else None,
            )
            for case in cases or [dataclasses.replace(STEP, what=what)]
        ],
    }


def test_markdown_has_figures_machine_and_command():
    text = report.markdown(some_results())
    assert "| JAX chansel auto | 1.50 (1.05–1.95) | 2,667 |" in text
    assert "| JAX chansel auto / JAX subkernel auto | 0.375 (0.263–0.487) |" in text
    assert "- JAX chansel grouped could not run: RuntimeError: [no] compiler" in text
    assert "Some CPU, 2 cores; python 3.11.1, jax 0.10; 2030-01-02" in text
    assert "float32 (TF32 off)" in text and "cores 50 % busy" in text
    assert text.endswith("```bash\npython -m experiments.benchmark --rounds=2\n```\n")
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {9, 3}


def test_epochs_are_the_originals_table():
    text = report.markdown(some_results("epoch"))
    assert "| run | 1 | 2 | s an epoch |" in text
    assert "| JAX subkernel auto | 0.00400 | 0.00400 | 0.00400 ± 0 |" in text


def test_step_tells_what_auto_took():
    text = report.markdown(some_results(took="native, shifted"))
    assert "\n- JAX chansel auto took native, shifted\n" in text
    assert "took" not in report.markdown(some_results())


def test_layers_are_columns_and_contestants_rows():
    other = dataclasses.replace(LAYER, layer=LayerShape(4, 2, 2, 1, 1))
    text = report.markdown(some_results("layer", [LAYER, other], took="native"))
    assert "| JAX chansel auto | native | native |" in text
    assert "|  | 8² 4→6 3×3/2 | 4² 2→2 1×1 |" in text
    assert "| JAX chansel auto | 1.50 | 1.50 |" in text
    assert text.count("| JAX chansel auto | 1.50 (1.05–1.95) | ") == 2
    for title, cell in (("GMAC/s", "0.667"), ("% of ceiling", "66.7")):
        heading, row = (
            f"{title} forward, float32 (TF32 off):",
            f"| JAX chansel auto | {cell} | {cell} |",
        )
        assert row in text.partition(heading)[2].partition("\n\n|")[2].split("\n\n")[0]


@pytest.mark.parametrize("width", [80, 160])
def test_terminal_shows_the_tables_at_every_width(width):
    console = Console(file=io.StringIO(), width=width, markup=False)
    report.print_report(some_results(), console)
    text = console.file.getvalue()
    assert "1.50 (1.05–1.95)" in text and "[no] compiler" in text
    assert "GMAC/s" in text and "…" not in text


@pytest.mark.parametrize(
    "value, text", [(0.0123, "0.0123"), (1.5, "1.50"), (1234.5, "1,234"), (0, "0")]
)
def test_three_digits(value, text):
    assert report.three_digits(value) == text


@pytest.mark.parametrize("what", ["step", "layer", "epoch"])
def test_chart_has_a_panel_for_each_case_with_bars_of_both_frameworks(what):
    cases = [LAYER, dataclasses.replace(LAYER, backward=True)] if what == "layer" else None
    found = some_results(what, cases)
    panels = chart.draw(found).axes
    assert len(panels) == len(found["cases"])
    for panel, case in zip(panels, found["cases"], strict=True):
        assert case["title"] in panel.get_title(loc="left")
        drawn = {to_hex(bar.get_facecolor()) for bar in panel.patches}
        assert {"#1f5fa8", "#c8511b"} <= drawn and len(panel.patches) == 3


def test_every_bar_of_the_chart_has_its_number_inside():
    bars = [
        {
            "framework": "JAX",
            "conv": "chansel",
            "name": str(median),
            "seconds": {"median": median, "p5": median, "p95": p95},
        }
        for median, p95 in [(1.0, 1.1), (1.2, 9.1), (1.4, 1.4), (20.0, 21.0)]
    ]
    axes = Figure().subplots()
    chart.draw_bars(axes, bars, 1e3)
    _, limit = axes.get_xlim()
    numbers = {text.get_text(): text.xy[0] for text in axes.texts}
    assert list(numbers) == ["1,000", "1,200", "1,400", "20,000 ▸"]
    assert max(numbers.values()) <= limit == pytest.approx(1.12 * 9100)
