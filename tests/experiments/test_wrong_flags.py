"""Every flag of every command, given what it must refuse: one line that names it, and its value."""

import dataclasses
import importlib
import json
import os
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import jax
import numpy as np
import pytest
import safetensors.numpy
from commands import environment

from chansel_jax.torch_weights import save_safetensors
from experiments.training.load import load_run

COMMANDS = (
    *("train", "compare", "evaluate", "predict", "study", "compress", "export"),
    *("benchmark", "profile", "scaling", "tune"),
)
# What a command cannot do without; RUN and DENSE are runs, IMAGES theirs.
REQUIRED = {
    "evaluate": ["--workdir=RUN", "--data-dir=IMAGES"],
    "predict": ["--workdir=RUN", "--images=IMAGES"],
    "compress": ["--workdir=DENSE", "--data-dir=IMAGES"],
    "export": ["--workdir=RUN"],
    "study": ["rank"],
}
FOLDER = "--dataset=folder --data-dir=IMAGES "

# A command, its words (the flag that is wrong comes last), and what is said of it.
WRONG = [
    ("train", FOLDER + "--width=0", "--width=0 must be an integer of at least 1"),
    ("train", FOLDER + "--rank=0", "--rank=0 must be "),
    ("train", FOLDER + "--rank=10", "--rank=10 must be "),
    ("train", FOLDER + "--conv=subkernel --rank=2", "--rank=2"),
    ("train", FOLDER + "--blocks=2,0", "--blocks=0 must be "),
    ("train", "--stem=deep", "invalid choice 'deep' for argument '--stem'"),
    ("train", "--replaced=none", "invalid choice 'none' for argument '--replaced'"),
    ("train", FOLDER + "--ranks=1,2,3", "--ranks=1,2,3 must have a rank for each of 12"),
    ("train", FOLDER + "--ranks=1", "--ranks=1 must have a rank for each of 12 convolutions"),
    ("train", "--config=TAGGED", "--config=TAGGED cannot be taken: a value is not what its tag"),
    ("train", "--blocks=1,,2", "--blocks: 1,,2 has an empty place between commas"),
    ("train", FOLDER + "--ranks=10,10", "must be at most 9, the elements of a 3 × 3 kernel"),
    ("train", FOLDER + "--conv=subkernel --norm", "--norm: the dense convolution has no two parts"),
    ("train", FOLDER + "--conv=subspace --share=0", "--share=0.0 must be in (0, 1]"),
    (
        "train",
        FOLDER + "--conv=subkernel --initialiser=spectral",
        "--initialiser=spectral is for the convolution chansel without norm only",
    ),
    (
        "train",
        FOLDER + "--norm --decay-composed",
        "--decay-composed is for the convolution chansel",
    ),
    ("train", FOLDER + "--share=0.5", "--share=0.5 is for the convolution subspace only"),
    ("train", "--dataset=folder --data-dir=NONE", "--data-dir=NONE is no folder"),
    ("train", "--dataset=folder --data-dir=EMPTY", "EMPTY"),
    ("train", FOLDER + "--image-size=0", "--image-size=0 must be at least 1"),
    ("train", "--image-size=0", "--image-size=0 is for the data set folder only"),
    ("train", "--image-size=8", "--image-size=8 is for the data set folder only"),
    ("train", FOLDER + "--classes=red,cow", "cow"),
    ("train", FOLDER + "--classes=red,red", "--classes=red,red"),
    ("train", FOLDER + "--train-per-class=0", "--train-per-class=0 must be at least 1"),
    ("train", FOLDER + "--train-per-class=1000", "--train-per-class=1000"),
    (
        "train",
        "--dataset=folder --data-dir=FLAT --split-seed=-1",
        "--split-seed=-1 must not be negative",
    ),
    ("train", "--dataset=folder --data-dir=FLAT --fold=5", "--fold=5 must be at most"),
    ("train", "--train-images=0", "--train-images=0 must be at least 1"),
    ("train", FOLDER + "--train-images=181", "--train-images=181 must be at most the 180"),
    ("train", "--validation-images=0", "--validation-images=0 must be at least 1"),
    ("train", "--workers=-1", "--workers=-1 must be from 0 to 1024"),
    ("train", "--learning-rate=0", "--learning-rate=0.0 must be positive"),
    ("train", "--learning-rate=nan", "--learning-rate: nan is no number"),
    ("evaluate", "--run=RUN", "Unrecognized options: --run"),
    ("train", "--recipe=bset", "--help explains"),
    ("compare", FOLDER + "--output=FILE", "--output=FILE is a file, not a folder"),
    ("train", "--dropout-rate=nan", "--dropout-rate: nan is no number"),
    ("train", "--width=" + "9" * 20, "is beyond 2,147,483,647"),
    ("train", FOLDER + "--width=1000000000", "parameters take more than the "),
    ("train", FOLDER + "--crop-padding=2000000000", "must be at most the 8 pixels"),
    ("train", FOLDER + "--image-size=1000000", "--image-size=1000000 must be at most 16384"),
    ("train", "--workdir=gs://bucket/run", "gs://bucket/run is an address"),
    ("evaluate", "--output=IMAGES/red", "--output=IMAGES/red lies within the images of IMAGES"),
    ("compare", FOLDER + "--output=IMAGES/new", "lies within the images of IMAGES"),
    ("compress", "--output=IMAGES/new", "lies within the images of IMAGES"),
    ("profile", "--layer=" + "9" * 20 + "x1x1x1x1", "each below a million"),
    ("train", "--warmup-fraction=1", "--warmup-fraction=1.0 must be in [0, 1)"),
    ("train", "--step-epochs=5,3", "--step-epochs=5,3 must be positive and increasing"),
    (
        "train",
        FOLDER + "--schedule=step",
        "--step-epochs=100,150,180 must begin before --epochs=20",
    ),
    ("train", FOLDER + "--schedule=step --epochs=5 --step-epochs=5", "--step-epochs=5 must begin"),
    ("train", "--momentum=-0.1", "--momentum=-0.1 must be in [0, 1)"),
    ("train", "--weight-decay=-1", "--weight-decay=-1.0 must not be negative"),
    ("train", "--weight-decay=inf", "--weight-decay=inf must be finite"),
    ("train", "--branches=0", "--branches=0 must be at least 1"),
    ("train", "--branches=2 --decay-composed", "--branches=2 must be 1 with --decay-composed"),
    ("train", "--clip-norm=-1", "--clip-norm=-1.0 must not be negative"),
    ("train", "--ema=1", "--ema=1.0 must be in [0, 1)"),
    ("train", "--undecayed=kernels", "'kernels' is none of biases, norms, depthwise"),
    ("train", "--crop-padding=-1", "--crop-padding=-1 must not be negative"),
    ("train", FOLDER + "--cutout=8", "--cutout=8 must be less than the 8 pixels"),
    ("train", "--cutout=-1", "--cutout=-1 must not be negative"),
    ("train", "--mixup=1e-46", "--mixup=1e-46 must be 0, or from 1e-30 to 1e30"),
    ("train", "--cutmix=inf", "--cutmix=inf must be 0, or from"),
    ("train", "--epochs=0", "--epochs=0 must be at least 1"),
    ("train", "--batch-size=0", "--batch-size=0 must be at least 1"),
    ("train", FOLDER + "--batch-size=182", "--batch-size=182 must be at most the 180"),
    (
        "train",
        FOLDER + "--batch-size=15",
        "--batch-size=15 must be divisible by the 2 devices: take 14 or 16",
    ),
    ("train", "--accumulate=0", "--accumulate=0 must be at least 1"),
    (
        "train",
        FOLDER + "--batch-size=16 --accumulate=3",
        "--batch-size=16 must be divisible by the 2 devices times --accumulate=3: take 12 or 18",
    ),
    ("train", "--label-smoothing=1", "--label-smoothing=1.0 must be in [0, 1)"),
    ("train", FOLDER + "--dropout-rate=1", "--dropout-rate=1.0 must be in [0, 1)"),
    ("train", "--seed=-1", "--seed=-1 must be in [0, 2**32)"),
    ("train", FOLDER + "--resume=must", "--resume=must"),
    ("train", FOLDER + "--init=NONE", "--init=NONE is neither the folder of a run nor a .safeten"),
    ("train", FOLDER + "--init=FILE", "--init=FILE is neither the folder of a run nor a .safeten"),
    ("train", FOLDER + "--init=EMPTY", "--init=EMPTY is neither the folder of a run nor a .safe"),
    ("train", FOLDER + "--init=RUN", "of shape (16,) in this network and of shape (4,) the"),
    ("train", FOLDER + "--init=DAMAGED", "--init=DAMAGED cannot be taken: it is not a safetensors"),
    ("train", FOLDER + "--init=OTHER", "--init=OTHER cannot be taken: it has no classifier"),
    ("train", "--config=NONE", "--config=NONE cannot be taken: No such file or directory ("),
    ("train", "--config=FILE", "--config=FILE cannot be taken: it must hold names with values ("),
    ("train", "--config=YAML", "--config=YAML cannot be taken: widht is no setting ("),
    ("train", "--workdir=", "--workdir: the path must not be empty"),
    ("train", FOLDER + "--workdir=FILE", "--workdir=FILE"),
    ("train", FOLDER + "--workdir=NONE/a[b]", "--workdir=NONE/a[b] must have none of"),
    ("train", FOLDER + "--workdir=IMAGES/run", "--workdir=IMAGES/run"),
    ("train", "--save-every-steps=0", "--save-every-steps=0 must be at least 1"),
    ("train", "--coordinator=host:1", "--coordinator=host:1 needs all of --coordinator, "),
    ("train", "--process-id=0 --num-processes=2", "--num-processes=2 needs all of "),
    ("train", "--coordinator=host:1 --num-processes=2 --process-id=-1", "--process-id=-1 must be "),
    ("train", "--num-processes=2 --process-id=0 --coordinator=host", "--coordinator=host must be "),
    ("train", "--num-processes=2 --process-id=0 --coordinator=host:65536", "to 65535"),
    (
        "train",
        "--coordinator=host:1 --process-id=0 --num-processes=0",
        "--num-processes=0 must be ",
    ),
    ("train", "--coordinator=host:1 --num-processes=2 --process-id=2", "--process-id=2 must be "),
    ("train", "--recipe=none", "invalid choice: 'none'"),
    ("compare", "--networks=chansel,dense", "--networks=chansel,dense: dense must be "),
    ("compare", "--networks=", "--networks= must be different networks, at least one"),
    ("compare", "--networks=chansel,chansel", "--networks=chansel,chansel must be different"),
    ("compare", FOLDER + "--networks=chansel-w0", "chansel-w0: --width=0 must be "),
    ("compare", "--seeds=1,1", "--seeds=1,1 must be different"),
    ("compare", "--seeds=0,-1", "--seeds=0,-1 must be in [0, 2**32)"),
    ("compare", "--output=FILE", "--output=FILE"),
    ("compare", "--output=OUT[1]", "OUT[1] must have none of * ? [ ] \\ in its path"),
    ("compare", FOLDER + "--output=OUT --width=0", "--width=0 must be an integer of at least 1"),
    ("study", "--epochs=0", "--epochs=0 must be at least 1"),
    ("study", "--train-images=0", "--train-images=0 must be at least 1"),
    ("study", "--seeds=", "--seeds= must be different seeds, at least one"),
    ("study", "--only=r5", "--only=r5 matches none of: subkernel; chansel-r1"),
    ("study", "--only=(", "--only=( is no regular expression: missing )"),
    (
        "study",
        "--dataset=folder --data-dir=IMAGES --image-size=8 --epochs=1 --train-images=90",
        "subkernel-seed0: batch_size=128 must be at most the 90 training images",
    ),
    (
        "compare",
        "--dataset=folder --data-dir=IMAGES --image-size=8 --batch-size=200",
        "subkernel-seed0: --batch-size=200 must be at most the 180 training images",
    ),
    ("study", "--output=FILE", "--output=FILE"),
    ("evaluate", "--data-dir=NONE", "--data-dir=NONE is no folder"),
    ("evaluate", "--workdir=NONE", "--workdir=NONE holds no run"),
    ("evaluate", "--epoch=9", "no checkpoint of epoch 9, only 2, 3"),
    ("evaluate", "--split=test", "--split=test: the data set "),
    ("evaluate", "--output=FILE", "--output=FILE"),
    ("predict", "--workdir=NONE", "--workdir=NONE holds no run"),
    ("predict", "--images=NONE", "--images=NONE is not a folder"),
    ("predict", "--images=EMPTY", "--images=EMPTY holds no files"),
    ("predict", "--epoch=9", "no checkpoint of epoch 9, only 2, 3"),
    ("predict", "--columns=id", "--columns=id must be two different headings"),
    ("predict", "--output=EMPTY", "--output=EMPTY is a folder"),
    ("predict", "--output=FILE/s.csv", "--output=FILE/s.csv"),
    ("study", "--output=OUT?", "OUT? must have none of * ? [ ] \\ in its path"),
    ("compress", "--output=OUT*", "OUT* must have none of * ? [ ] \\ in its path"),
    ("compress", "--data-dir=NONE", "--data-dir=NONE is no folder"),
    ("compress", "--output=FILE", "--output=FILE"),
    ("compress", "--workdir=NONE", "--workdir=NONE holds no run"),
    ("compress", "--workdir=RUN", "--workdir=RUN is a run of --conv=chansel, not subkernel"),
    ("compress", "--ranks=0", "--ranks=0 must be at least 1"),
    ("compress", "--ranks=", "--ranks=, --energies= and --parameter-budgets= name nothing to make"),
    ("compress", "--energies=1.5", "--energies=1.5 must be in (0, 1]"),
    ("compress", "--parameter-budgets=0", "--parameter-budgets=0 must be at least 1"),
    (
        "compress",
        "--distillation-weight=1.5",
        "--distillation-weight=1.5 must be in [0, 1]",
    ),
    ("compress", "--temperature=0", "--temperature=0.0 must be positive and finite"),
    ("compress", "--epoch=9", "no checkpoint of epoch 9, only 2, 3"),
    ("export", "--workdir=NONE", "--workdir=NONE holds no run"),
    ("export", "--format=pickle", "pickle"),
    ("export", "--format=", "--format= must be different formats, at least one"),
    ("export", "--format=onnx,onnx", "--format=onnx,onnx must be different formats"),
    ("export", "--epoch=9", "no checkpoint of epoch 9, only 2, 3"),
    ("export", "--output=FILE", "--output=FILE is a file, not a folder"),
    ("export", "--output=TAKEN", "--output=TAKEN: README.md is a folder, where files are put"),
    ("benchmark", "--output=TAKEN", "--output=TAKEN: README.md is a folder, where files are put"),
    ("compare", FOLDER + "--output=TAKEN", "--output=TAKEN: README.md is a folder, where files"),
    ("profile", "--output=TAKEN", "--output=TAKEN: README.md is a folder, where files are put"),
    ("export", "--output=LINK", "--output=LINK is a link that leads nowhere, not a folder"),
    (
        "train",
        FOLDER + "--blocks=1 --width=4 --init=INFINITE",
        "--init=INFINITE has values that are not finite in params.classifier.bias and 1 others",
    ),
    ("export", "--output=FILE/new", "--output=FILE/new"),
    ("export", "--output=IMAGES/new", "--output=IMAGES/new lies within the images of IMAGES"),
    ("benchmark", "--batch-size=0", "--batch-size=0 must be at least 1"),
    ("benchmark", "--image-size=0", "--image-size=0 must be at least 1"),
    ("benchmark", "--what=layer --shapes=8x8", "--shapes=8x8 must be "),
    ("benchmark", "--shapes=8x8x8x3x1", "--shapes=8x8x8x3x1 has no meaning with --what=step"),
    ("benchmark", "--dtypes=tf32", "--dtypes=tf32: TF32 exists on GPUs only"),
    ("benchmark", "--convs=", "--convs= must be different convolutions, at least one"),
    ("benchmark", "--lowerings=quick", "--lowerings=quick may name "),
    ("benchmark", "--torch=slow", "--torch: no type matching"),
    ("benchmark", "--convs=dense", "--convs=dense must be CONV or CONV-w"),
    ("benchmark", "--what=layer --convs=chansel-w8", "--convs=chansel-w8 has no meaning with "),
    ("benchmark", "--convs=chansel,chansel", "--convs=chansel,chansel must be different"),
    ("benchmark", "--dtypes=float32,float32", "--dtypes=float32,float32 must be different values"),
    ("benchmark", "--lowerings=lax,lax", "--lowerings=lax,lax must be different values"),
    ("benchmark", "--lowerings= --torch=", "--lowerings= and --torch= leave nothing to be timed"),
    ("benchmark", "--output=COMPARED", "--output=COMPARED holds the results of another command"),
    ("scaling", "--output=COMPARED", "--output=COMPARED holds the results of another command"),
    ("compress", "--output=COMPARED", "--output=COMPARED holds the results of another command"),
    ("compress", "--ranks=1,1", "--ranks=1,1 must be different values"),
    (
        "study",
        FOLDER + "--output=COMPARED",
        "holds the results of another command: compare --seeds",
    ),
    ("study", FOLDER + "--output=WIDTH", "holds the results of another command: study width"),
    ("benchmark", "--rounds=0", "--rounds=0 must be at least 1"),
    ("benchmark", "--round-seconds=0", "--round-seconds=0.0 must be positive"),
    ("benchmark", "--what=epoch --runs=0", "--runs=0 must be at least 1"),
    ("benchmark", "--runs=3", "--runs=3 has no meaning with --what=step"),
    ("benchmark", "--what=epoch --epochs=0", "--epochs=0 must be at least 1"),
    ("benchmark", "--cpu-devices=0", "--cpu-devices=0 must be at least 1"),
    ("benchmark", "--loader-workers=-1", "--loader-workers=-1 must not be negative"),
    ("benchmark", "--seed=-1", "--seed=-1 must be in [0, 2**32)"),
    ("benchmark", "--output=FILE", "--output=FILE"),
    ("benchmark", "--what=epoch --dataset=folder --data-dir=NONE", "--data-dir=NONE is no folder"),
    ("benchmark", "--what=epoch --dataset=folder --data-dir=IMAGES --classes=cow", "cow"),
    (
        "benchmark",
        "--what=epoch --dataset=folder --data-dir=IMAGES --train-per-class=0",
        "--train-per-class=0 must be at least 1",
    ),
    ("profile", "--batch-size=0", "--batch-size=0 must be at least 1"),
    ("profile", "--batch-size=3", "--batch-size=3"),
    ("profile", "--steps=0", "--steps=0 must be at least 1"),
    ("profile", "--convs=", "--convs= must be different convolutions, at least one"),
    ("profile", "--layer=32x16x16x3", "--layer=32x16x16x3 must be SIZE"),
    ("profile", "--output=FILE", "--output=FILE"),
    ("scaling", "--batch-size=0", "--batch-size=0 must be at least 1"),
    ("scaling", "--convs=", "--convs= must be different convolutions, at least one"),
    ("scaling", "--blocks=0", "--blocks=0 must be at least 1"),
    ("scaling", "--devices=0", "--devices=0"),
    ("scaling", "--devices=1,3", "--batch-size=128 must be divisible by --devices=3"),
    ("scaling", "--devices=64", "--devices=64 must be at most the 2"),
    ("scaling", "--steps=0", "--steps=0 must be at least 1"),
    ("scaling", "--rounds=0", "--rounds=0 must be at least 1"),
    ("scaling", "--bandwidth=0", "--bandwidth=0.0 must be above 0"),
    ("scaling", "--bandwidth=inf", "--bandwidth=inf must be above 0, and finite"),
    ("scaling", "--latency=-1", "--latency=-1.0 must be above 0"),
    ("scaling", "--output=FILE", "--output=FILE"),
    ("tune", "--batch-size=0", "--batch-size=0 must be at least 1"),
    ("tune", "--dtypes=", "--dtypes= must be different dtypes, at least one"),
    ("tune", "--rounds=0", "--rounds=0 must be at least 1"),
]


def flags(settings_type):
    """The flags of a command: the dataclass that declares each, its name and its type."""
    hints = get_type_hints(settings_type)
    for field in dataclasses.fields(settings_type):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from flags(hints[field.name])
        else:
            yield settings_type, field.name, hints[field.name]


def module(command):
    return importlib.import_module(f"experiments.{command}")


def kinds(hint):
    """The types that a flag's value may have, `...` and `None` among them."""
    return {hint, *(kind for argument in get_args(hint) for kind in kinds(argument))}


def takes_any_text(hint):
    return bool(kinds(hint) & {str, Path}) and get_origin(hint) is not Literal


# Of each flag, which several commands may share: one of these.
MISTYPED = {
    (owner, name): (command, f"--{name.replace('_', '-')}")
    for command in COMMANDS
    for owner, name, hint in flags(module(command).Settings)
    if not takes_any_text(hint) and hint is not bool and name != "name"
}


def refusal(command, words, monkeypatch, capsys):
    """How the command ended, and what it said on the standard error."""
    monkeypatch.setattr("sys.argv", [command, *words])
    # JAX has its devices here, and no other process is waited for.
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setenv("XLA_FLAGS", environment(devices=2)["XLA_FLAGS"])
    chosen = module(command)
    with pytest.raises(SystemExit) as stopped:
        chosen.run(
            *(chosen.main, chosen.Settings, command, getattr(chosen, "RECIPES", None)),
            getattr(chosen, "read_config", None),
        )
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("command", "flag"), MISTYPED.values())
def test_value_of_another_type_is_refused(command, flag, monkeypatch, capsys):
    words = [*REQUIRED.get(command, []), f"{flag}=nonsense"]
    code, errors = refusal(command, words, monkeypatch, capsys)
    assert code == 2
    assert flag in errors and "nonsense" in errors


@pytest.fixture(scope="module")
def places(settings, whole, dense, tmp_path_factory):
    """Paths by the names that stand for them above."""
    root = tmp_path_factory.mktemp("places")
    (root / "file").touch()
    (root / "damaged.safetensors").write_bytes(b"{}")
    safetensors.numpy.save_file({"a": np.zeros(1)}, root / "other.safetensors")
    (root / "config.yaml").write_text("epochs: 3\nnetwork: {widht: 3}\n")
    (root / "tagged.yaml").write_text('epochs: !!int ""\n')
    (root / "empty").mkdir()
    for name, flags_of_it in (
        ("compared", "compare --seeds=0"),
        ("width", "study width --epochs=1"),
    ):
        (root / name).mkdir()
        written = {"command": f"python -m experiments.{flags_of_it}"}
        (root / name / "results.json").write_text(json.dumps(written))
    (root / "link").symlink_to("nowhere")
    (root / "taken" / "README.md").mkdir(parents=True)
    network = load_run(settings.workdir).network
    network.classifier.bias[...] *= np.inf
    network.stem.conv.kernel[...] *= np.nan
    save_safetensors(network, root / "infinite.safetensors")
    return {
        "RUN": settings.workdir,
        "DENSE": dense,
        "IMAGES": settings.data.data_dir,
        "FLAT": settings.data.data_dir / "train",
        "FILE": root / "file",
        "YAML": root / "config.yaml",
        "DAMAGED": root / "damaged.safetensors",
        "INFINITE": root / "infinite.safetensors",
        "LINK": root / "link",
        "TAGGED": root / "tagged.yaml",
        "TAKEN": root / "taken",
        "COMPARED": root / "compared",
        "WIDTH": root / "width",
        "OTHER": root / "other.safetensors",
        "EMPTY": root / "empty",
        "NONE": root / "none",
        "OUT": root / "out",
    }


@pytest.mark.parametrize(("command", "words", "message"), WRONG)
def test_wrong_value_is_named_in_a_line(
    command, words, message, places, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    words = [*REQUIRED.get(command, []), *words.split()]
    for name, path in places.items():
        words = [word.replace(f"={name}", f"={path}") for word in words]
        message = message.replace(name, str(path))
    before = sorted(os.listdir(places["RUN"]))
    code, errors = refusal(command, words, monkeypatch, capsys)
    assert code in (1, 2) and message in errors
    assert len(errors.splitlines()) == 1 and errors.startswith("error: ")
    assert sorted(os.listdir(places["RUN"])) == before and not os.listdir(places["EMPTY"])
    assert places["FILE"].read_text() == ""
    assert not os.listdir(tmp_path) and not places["OUT"].exists()


def test_every_flag_has_a_wrong_value_in_the_table():
    tried = {
        (command, word.split("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_"))
        for command, words, _ in WRONG
        for word in words.split()[-1:]
    }
    missing = set()
    for command in COMMANDS:
        for owner, name, hint in flags(module(command).Settings):
            # On or off, or one of a few words: only a value of another type is wrong.
            if hint is bool or get_origin(hint) is Literal:
                continue
            owners = [
                other
                for other in COMMANDS
                if any(found[:2] == (owner, name) for found in flags(module(other).Settings))
            ]
            if not any((other, name) in tried for other in owners):
                missing.add((command, name))
    assert not missing
