"""What the settings of a training name, refuse and build; and what is printed of a run."""

import dataclasses
import functools
import io
import json
import re
import shlex
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bsconv.pytorch import get_model
from flax import nnx
from layers import torch_shapes
from rich.console import Console

from chansel_jax import resnet14
from chansel_jax.counting import LayerCount, count_network
from chansel_jax.data import DATASETS, Dataset, Split
from chansel_jax.networks.resnet import CONVS, PRESETS
from chansel_jax.training.augmentation import Augmentation
from chansel_jax.training.optimizer import OptimizerSettings
from experiments.cli.flags import parse, typed
from experiments.training import printing
from experiments.training.config_file import read_config
from experiments.training.settings import (
    RECIPES,
    DataSettings,
    NetworkSettings,
    Settings,
    TrainingSettings,
    build_network,
    decisive,
    initial_network,
    network_config,
    run_name,
    with_dense,
)
from experiments.training.typed_json import from_json
from experiments.training.workdir import filled


@functools.cache
def built(num_classes=3, conv="chansel", dropout_rate=None, **network):
    """The network of these settings, without arrays."""
    settings = Settings(
        conv=conv,
        network=NetworkSettings(**network),
        training=TrainingSettings(dropout_rate=dropout_rate),
    )
    return nnx.eval_shape(lambda: build_network(settings, num_classes))


# Names


@pytest.mark.parametrize(
    "settings_type, name, choices",
    [
        (DataSettings, "dataset", DATASETS),
        (Settings, "conv", tuple(CONVS)),
        (NetworkSettings, "model", tuple(PRESETS)),
    ],
)
def test_choices_are_those_of_the_library(settings_type, name, choices):
    assert get_args(settings_type.__annotations__[name]) == choices


def test_run_is_named_by_dataset_model_conv_and_seed():
    settings = Settings(
        conv="subkernel",
        network=NetworkSettings(model="resnet18"),
        data=DataSettings(dataset="cifar10"),
        seed=7,
    )
    assert run_name(settings) == "cifar10-resnet18-subkernel-seed7"
    assert run_name(Settings()) == "silhouettes-resnet14-chansel-seed0"


def test_name_is_short_enough_for_a_folder_in_any_script():
    classes = tuple(chr(0x20000 + i) * 9 for i in range(9))  # characters of four bytes
    name = run_name(Settings(data=DataSettings(dataset="folder", classes=classes)))
    assert len(name.encode()) < 255


def test_name_tells_runs_of_other_settings_apart():
    best = RECIPES["best"]
    shorter = dataclasses.replace(best, epochs=15, dropout_rate=None)
    names = {
        run_name(Settings(**given)): given
        for given in (
            {},
            {"training": best},
            {"training": shorter},
            {"network": NetworkSettings(width=32, rank=2)},
            {"data": DataSettings(dataset="folder", classes=("cat", "[a/b]"))},
            {"network": NetworkSettings(ranks=(1, 2) * 6), "training": shorter},
            {"network": NetworkSettings(ranks=(1, 3) * 6), "training": shorter},
        )
    }
    *short, first, second = names
    assert short == [
        "silhouettes-resnet14-chansel-seed0",
        "silhouettes-resnet14-chansel-best-seed0",
        "silhouettes-resnet14-chansel-best-epochs=15-dropout_rate=None-seed0",
        "silhouettes-resnet14-chansel-width=32-rank=2-seed0",
        "folder-resnet14-chansel-classes=cat,_a_b_-seed0",
    ]
    assert first != second and max(map(len, names)) < 120


# Values


@pytest.mark.parametrize(
    "settings_type, name, value",
    [
        (TrainingSettings, "label_smoothing", -0.1),
        (TrainingSettings, "label_smoothing", float("nan")),
        (Settings, "seed", 2**32),
    ],
)
def test_bad_setting_is_named_with_its_value(settings_type, name, value):
    with pytest.raises(ValueError, match=f"{name}={value} must be "):
        settings_type(**{name: value})


@pytest.mark.parametrize(
    "settings_type, name, value",
    [
        (TrainingSettings, "epochs", 1),
        (TrainingSettings, "batch_size", 1),
        (Settings, "seed", 2**32 - 1),
    ],
)
def test_outermost_good_value_is_taken(settings_type, name, value):
    assert getattr(settings_type(**{name: value}), name) == value


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_gives_what_no_flag_does(recipe):
    settings = parse(Settings, "train", [f"--recipe={recipe}", "--batch-size=8"], RECIPES)
    assert settings.training == dataclasses.replace(RECIPES[recipe], batch_size=8)


def test_recipe_is_the_first_by_default_and_in_the_help(capsys):
    assert parse(Settings, "train", [], RECIPES) == Settings(training=RECIPES["short"])
    with pytest.raises(SystemExit) as stopped:
        parse(Settings, "train", ["--recipe=wurst"], RECIPES)
    assert stopped.value.code == 2 and "wurst" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(Settings, "train", ["--help"], RECIPES)
    assert "--recipe={short,original,best}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings",
    [
        Settings(),
        Settings(training=RECIPES["best"]),
        Settings(
            conv="subkernel",
            data=DataSettings(dataset="folder", classes=("a b", "c")),
            training=dataclasses.replace(RECIPES["best"], epochs=7),
        ),
        Settings(
            training=dataclasses.replace(RECIPES["short"], augmentation=Augmentation(0, False))
        ),
    ],
)
def test_typed_command_gives_the_settings_again(settings):
    words = shlex.split(typed("train", settings, RECIPES))
    assert words[:3] == ["python", "-m", "experiments.train"]
    assert parse(Settings, "train", words[3:], RECIPES) == settings


def parsed(path, *arguments):
    return parse(Settings, "train", [f"--config={path}", *arguments], RECIPES, read_config)


def test_config_of_a_run_gives_its_settings_and_flags_win(tmp_path):
    settings = Settings(
        conv="subkernel",
        network=NetworkSettings(blocks=(1, 2), stem="small", initialiser="torch", norm=True),
        data=DataSettings(dataset="folder", classes=("a b", "c")),
        training=dataclasses.replace(RECIPES["best"], epochs=7, dropout_rate=None),
        seed=3,
    )
    stored = decisive(settings)
    stored["network"]["init"] = stored["network"].pop("initialiser")  # as in an older run
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"settings": stored, "data": {}, "data_dir": str(tmp_path)}))
    data = dataclasses.replace(settings.data, data_dir=tmp_path)
    expected = dataclasses.replace(settings, data=data)
    assert parsed(path) == expected
    training = dataclasses.replace(settings.training, epochs=2)
    changed = dataclasses.replace(expected, training=training, seed=0)
    assert parsed(path, "--epochs=2", "--seed=0") == changed
    of_recipe = dataclasses.replace(expected, training=RECIPES["original"])
    assert parsed(path, "--recipe=original") == of_recipe


def test_config_in_yaml_is_flat_or_nested(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "recipe: best\nwidth: 8\nlearning-rate: 1e-3\nflip: false\nundecayed: [norms]\n"
        "training:\n  epochs: 4\n  augmentation: {cutout: 3}\n"
    )
    words = "--recipe=best --width=8 --learning-rate=1e-3 --no-flip --undecayed=norms --epochs=4"
    assert parsed(path) == parse(Settings, "train", [*words.split(), "--cutout=3"], RECIPES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochen: 3", "epochen is no setting"),
        ("training: {width: 3}", "width is no setting"),
        ("network: {epochs: 3}", "epochs is no setting"),
        ("network: {deep: {epochs: 3}}", "deep is no setting"),
        ("flip: maybe", "flip=maybe must be true or false"),
        ("width: true", "width=True must be a text, a number or an array"),
        ("width: {a: 1}", "width={'a': 1} must be"),
        ("epochs: 0", "epochs=0 must be at least 1"),
        ("[1, 2]", "it must hold names with values"),
        ("a: [", "while parsing"),
        ("[" * 5000, "nested too deeply"),
        ("epochs: 3\nepochs: 4", "epochs is given twice"),
        ("network: {width: 3, width: 4}", "width is given twice"),
        ("epochs: 3\ntraining: {epochs: 4}", "epochs is given twice"),
        ("batch-size: 3\nbatch_size: 4", "batch_size is given twice"),
        ("epochs: sixty", "sixty is no integer; --config="),
        ("classes: [cat, no]", "classes=['cat', False] must be an array of texts or numbers"),
        ("classes: [cat, null]", "classes=['cat', None] must be"),
    ],
)
def test_wrong_config_is_told_in_a_line(tmp_path, capsys, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        parsed(path)
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and len(told.splitlines()) == 1
    assert message in told


def test_wrong_config_of_a_run_is_told_in_a_line(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text('{"epochs": 3, "epochs": 4}')
    with pytest.raises(SystemExit):
        parsed(path)
    assert "config.json cannot be taken: epochs is given twice" in capsys.readouterr().err


def test_config_is_read_as_utf_8_whatever_the_locale_says(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    path.write_text("classes: [hündin, кот]\n", encoding="utf-8")
    monkeypatch.setattr(io, "text_encoding", lambda *_: "latin-1")  # what `open` asks
    assert parsed(path).data.classes == ("hündin", "кот")


def test_flags_of_all_groups_reach_the_settings():
    settings = parse(
        Settings,
        "train",
        ["--conv=subkernel", "--dataset=folder", "--data-dir=images", "--classes=cat,dog"]
        + ["--undecayed=", "--step-epochs=3,5", "--no-flip", "--width=8", "--epochs=4"],
    )
    default = Settings()
    assert settings == dataclasses.replace(
        default,
        conv="subkernel",
        network=NetworkSettings(width=8),
        data=DataSettings(dataset="folder", data_dir=Path("images"), classes=("cat", "dog")),
        training=TrainingSettings(
            optimization=OptimizerSettings(undecayed=(), step_epochs=(3, 5)),
            augmentation=Augmentation(flip=False),
            epochs=4,
        ),
    )


# Networks


@pytest.mark.parametrize("model", PRESETS)
@pytest.mark.parametrize("conv", CONVS)
def test_network_by_default_is_the_preset(model, conv):
    preset = dataclasses.replace(PRESETS[model], conv=CONVS[conv], num_classes=5)
    settings = Settings(conv=conv, network=NetworkSettings(model=model))
    assert network_config(settings, 5) == preset


def test_network_is_that_of_its_config():
    network = built(5, conv="subkernel")
    assert network.config == network_config(Settings(conv="subkernel"), 5)
    assert network.classifier.out_features == 5


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("blocks", (1, 3), (1, 3)),
        ("width", 8, 8),
        ("stem", "small", "small"),
        ("replaced", "3x3", "3x3"),
        ("rank", 3, 3),
        ("use_bias", True, True),
        ("input_norm", True, True),
        ("dropout_rate", 0.5, 0.5),
        ("dropout_rate", 0.0, 0.0),
        ("dtype", "bfloat16", jnp.bfloat16),
    ],
)
def test_network_honours_each_setting_and_changes_nothing_else(name, value, expected):
    assert built(**{name: value}).config == dataclasses.replace(built().config, **{name: expected})


def test_initialisation_and_norm_reach_the_convolutions():
    network = built(initialiser="torch", norm=True, ranks=(1, 2) * 6)
    assert network.config.conv.func is CONVS["chansel"]
    assert network.blocks[0].conv2.norm is not None and network.blocks[0].conv2.rank == 2
    settings = Settings(network=NetworkSettings(initialiser="torch"))
    kernel = jax.jit(lambda: build_network(settings, 3).blocks[5].conv2.pointwise[...])()
    # PyTorch: uniform within ± 1 / sqrt(fan_in).
    assert float(jnp.abs(kernel).max()) == pytest.approx(1 / 8, rel=1e-2)
    assert float(kernel.std()) == pytest.approx(1 / 8 / 3**0.5, rel=0.03)


def test_a_spectral_beginning_has_the_factors_of_a_dense_one():
    """As near to the dense kernel as any of that rank is, by NumPy's singular values."""
    shape = NetworkSettings(blocks=(1, 1), width=4, ranks=(1, 0, 2, 1), initialiser="spectral")
    settings = Settings(network=shape, seed=3)
    network = initial_network(settings, 3)
    dense = initial_network(with_dense(settings), 3)
    for name in ("classifier", "stem.conv", "blocks.0.conv2"):
        own, others = (nnx.to_flat_state(nnx.state(each)) for each in (network, dense))
        own, others = (
            {path: leaf[...] for path, leaf in each if ".".join(map(str, path)).startswith(name)}
            for each in (own, others)
        )
        assert len(own) and own.keys() == others.keys()
        for path in own:
            np.testing.assert_array_equal(own[path], others[path])
    for block, name, rank in ((0, "conv1", 1), (1, "conv1", 2), (1, "shortcut", 1)):
        layer, kernel = (getattr(each.blocks[block], name) for each in (network, dense))
        kernel = np.asarray(kernel.kernel[...])
        error = ((layer.composed_kernel() - kernel) ** 2).sum((0, 1, 2))
        values = np.linalg.svd(kernel.reshape(-1, *kernel.shape[2:]).T, compute_uv=False)
        np.testing.assert_allclose(error, (values[:, rank:] ** 2).sum(1), rtol=1e-4, atol=1e-9)


# By the names of the package bsconv, how they are typed.
ITS_NETWORKS = {
    "resnet10": "--model=resnet18 --blocks=1,1,1,1 --replaced=3x3 --input-norm",
    "resnet18": "--model=resnet18 --replaced=3x3 --input-norm",
    "resnet34": "--model=resnet34 --replaced=3x3 --input-norm",
    **{f"cifar_resnet{n}": f"--model=cifar_resnet{n}" for n in (20, 56, 110)},
    **{f"cifar_wrn{n}": f"--model=cifar_wrn{n}" for n in ("16_1", "16_2", "40_1", "28_2", "28_10")},
    "cifar_wrn40_4": "--model=cifar_wrn40_1 --width=64",
}
ITS_CONVS = {
    "": "--conv=subkernel",
    "_bsconvu": "--conv=chansel",
    "_bsconvs_p1d2": "--conv=subspace --share=0.5 --norm",
    "_bsconvs_p1d4": "--conv=subspace --norm",
}


@pytest.mark.parametrize("name", ITS_NETWORKS)
@pytest.mark.parametrize("variant", ITS_CONVS)
def test_flags_give_the_networks_of_bsconv(name, variant):
    with torch_shapes():
        expected = sum(p.numel() for p in get_model(name + variant, num_classes=10).parameters())
    words = f"{ITS_NETWORKS[name]} {ITS_CONVS[variant]}".split()
    config = network_config(parse(Settings, "train", words), 10)
    assert sum(row.parameters for row in count_network(config, 32)) == expected


def test_norm_of_the_images_by_hand():
    """BatchNorm of three channels has a scale and a bias for each."""
    counts = [
        sum(row.parameters for row in count_network(network_config(settings, 1000), 224))
        for settings in (
            Settings(network=NetworkSettings(model="resnet18", replaced="3x3", input_norm=norm))
            for norm in (False, True)
        )
    ]
    assert counts == [1_959_208, 1_959_208 + 2 * 3]


def test_share_is_that_of_the_subspaces():
    network = built(conv="subspace", share=0.5, width=20)
    assert network.blocks[0].conv1.subspace.shape == (20, 10)
    assert network.blocks[0].conv1.norm is None
    assert built(conv="subspace").config.conv is CONVS["subspace"]
    for conv in ("chansel", "subkernel"):
        with pytest.raises(ValueError, match="share=0.5 is for the convolution subspace only"):
            built(conv=conv, share=0.5)


def test_config_of_a_run_from_before_a_setting_has_its_default():
    settings = Settings(conv="subspace", network=NetworkSettings(norm=True))
    stored = decisive(settings)
    for name in ("share", "input_norm"):
        del stored["network"][name]
    assert from_json(Settings, stored) == settings
    assert filled(stored, decisive(Settings())) == decisive(settings)


def test_seed_decides_the_initial_parameters():
    @functools.partial(jax.jit, static_argnums=0)
    def kernel(seed):
        return build_network(Settings(seed=seed), 3).classifier.kernel[...]

    zero, one = kernel(0), kernel(1)
    expected = jax.jit(lambda: resnet14(rngs=nnx.Rngs(0)).classifier.kernel[...])()
    np.testing.assert_array_equal(zero, expected)
    assert not np.array_equal(zero, one)


# Printing


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=100)


def printed(console):
    return console.file.getvalue()


def row(epoch, val_loss, accuracy):
    return {
        "epoch": epoch,
        "train_loss": 1.25,
        "train_accuracy": accuracy,
        "val_loss": val_loss,
        "val_accuracy": accuracy / 2,
        "learning_rate": 0.005,
        "images_per_second": 12345.6,
        "seconds": 2.34,
    }


def test_line_of_an_epoch_has_its_figures_and_the_best_epoch():
    line = printing.epoch_line([row(1, 0.5, 0.4), row(2, 0.75, 0.5)])
    figures = "2 1.2500 50.00% 0.7500 25.00% 5.00e-03 12,346 2.3 1 (0.5000)"
    assert " ".join(line.split()) == figures


@pytest.mark.parametrize("accuracy", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("epoch", [1, 200])
@pytest.mark.parametrize("top5", [False, True])
def test_line_of_an_epoch_stands_under_its_header(accuracy, epoch, top5):
    figures = row(epoch, 0.5, accuracy) | ({"val_top5_accuracy": accuracy} if top5 else {})
    line, header = printing.epoch_line([figures]), printing.epoch_header(top5)
    headings = [m.end() for m in re.finditer(r"\S+(?: \S+)*", header)]
    ends = [m.end() for m in re.finditer(r"\S+", line)]
    assert ends[: 8 + top5] == headings[: 8 + top5] and ("top 5" in header) == top5


def test_header_names_devices_versions_and_sizes(console):
    splits = {
        name: Split(np.zeros((count, 28, 30, 3), np.uint8), np.zeros(count, np.int32))
        for name, count in (("train", 1200), ("validation", 300))
    }
    dataset = Dataset(name="pets", class_names=("cat", "dog"), splits=splits)
    printing.print_header(dataset, jax.devices(), console)
    devices, versions, data = printed(console).splitlines()
    assert devices == "2 × cpu (cpu)"
    assert f"jax {jax.__version__}" in versions
    assert data == "pets: 1,200 train, 300 validation images of 28 × 30 × 3, 2 classes"


def test_layers_are_listed_with_their_total(console):
    rows = [
        LayerCount("stem.conv", "subkernel", (32, 32, 16), 448, 442368),
        LayerCount("classifier", "linear", (3,), 1195, 1192),
    ]
    printing.print_layers(rows, "resnet14", console)
    lines = [line.split() for line in printed(console).splitlines()]
    assert ["stem.conv", "subkernel", "32", "×", "32", "×", "16", "448", "442,368"] in lines
    assert ["classifier", "linear", "3", "1,195", "1,192"] in lines
    assert ["total", "1,643", "443,560"] in lines


@pytest.mark.parametrize("width", [40, 50, 60])
def test_no_figure_of_the_layers_is_cut(width):
    console = Console(file=io.StringIO(), width=width)
    rows = [LayerCount("blocks.10.shortcut", "subkernel", (112, 112, 1024), 23456789, 9876543210)]
    printing.print_layers(rows, "resnet14", console)
    for cell in ("112 × 112 × 1024", "23,456,789", "9,876,543,210"):
        assert cell in printed(console), cell


def test_summary_shows_the_row_of_the_table_and_the_folder(console):
    summary = {
        "dataset": "silhouettes",
        "model": "resnet14",
        "conv": "chansel",
        "parameters": 27363,
        "best_val_loss": 0.12345,
        "train_loss_at_best": 0.25,
        "best_epoch": 7,
        "best_val_accuracy": 0.987,
        "best_accuracy_epoch": 9,
        "seconds_per_epoch": 1.5,
    }
    printing.print_summary(summary, Path("runs/mine"), console)
    text = " ".join(printed(console).split())
    assert "silhouettes, resnet14, chansel" in text
    assert "27,363 0.1235 (train 0.2500, epoch 7) 98.70% (epoch 9) 1.50" in text
    assert text.endswith("written to runs/mine")
    printing.print_summary(summary | {"best_val_top5_accuracy": 0.875}, Path("runs/mine"), console)
    assert "top-5" in printed(console) and "87.50%" in printed(console)
