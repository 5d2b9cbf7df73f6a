"""Settings from flags, and how a command ends."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import pytest

import experiments
from experiments import evaluate, study
from experiments.cli import ending
from experiments.cli.command import check_output, run
from experiments.cli.errors import CommandError
from experiments.cli.flags import parse
from experiments.training import settings as training

ROOT = Path(experiments.__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of flags."""

    kinds: tuple[Literal["biases", "norms"], ...] = ("biases",)
    """Kinds of parameters."""
    rate: float = 0.5
    """How fast."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command does."""

    group: Group = Group()
    names: tuple[str, ...] = ()
    """Names in order."""
    counts: tuple[int, ...] = (1, 2)
    """Counts in order."""
    pair: tuple[int, int] = (3, 4)
    flag: bool = False

    def __post_init__(self):
        if 0 in self.counts:
            raise ValueError(f"counts={self.counts} must not be zero")


def parsed(*arguments):
    return parse(Settings, "example", list(arguments))


def run_with(monkeypatch, main, *arguments):
    monkeypatch.setattr(sys, "argv", ["example", *arguments])
    run(main, Settings, "example")


# Parsing


def test_no_arguments_give_the_defaults():
    assert parsed() == Settings()


@pytest.mark.parametrize(
    "argument, name, value",
    [
        ("--names=cat,dog", "names", ("cat", "dog")),
        ("--names=cat", "names", ("cat",)),
        ("--names=cat, big dog ,", "names", ("cat", "big dog")),
        ("--names=1,2", "names", ("1", "2")),
        ("--names=", "names", ()),
        ("--counts=3,1,2", "counts", (3, 1, 2)),
        ("--counts=7", "counts", (7,)),
        ("--counts=-1, 5", "counts", (-1, 5)),
        ("--counts=", "counts", ()),
    ],
)
def test_sequences_are_comma_separated(argument, name, value):
    assert parsed(argument) == dataclasses.replace(Settings(), **{name: value})


@pytest.mark.parametrize(
    "argument, kinds",
    [
        ("--kinds=norms,biases", ("norms", "biases")),
        ("--kinds=norms", ("norms",)),
        ("--kinds=", ()),
    ],
)
def test_sequences_of_choices_are_comma_separated(argument, kinds):
    assert parsed(argument) == Settings(Group(kinds=kinds))


def test_value_may_be_an_argument_of_its_own():
    assert parsed("--counts", "5,6", "--names", "cat") == Settings(counts=(5, 6), names=("cat",))


def test_groups_have_no_prefix():
    assert parsed("--rate=2", "--flag") == Settings(Group(rate=2.0), flag=True)


def test_pair_of_fixed_length_stays_as_it_is():
    assert parsed("--pair", "5", "6") == Settings(pair=(5, 6))


@pytest.mark.parametrize(
    "argument, named",
    [
        ("--counts=1,two", "--counts: two is no integer"),
        ("--counts=1.5", "--counts: 1.5 is no integer"),
        ("--counts=0", "--counts=(0,) must not be zero"),
        ("--kinds=biases,kernels", "--kinds: 'kernels' is none of biases, norms"),
        ("--rate=fast", "--rate"),
        ("--nmaes=cat", "--nmaes"),
        ("--group.rate=2", "--group.rate"),
    ],
)
def test_wrong_value_ends_with_2_and_is_named(argument, named, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(argument)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err


def test_help_shows_texts_choices_and_defaults(capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "usage: python -m experiments.example " in text
    assert "What the command does." in text
    assert "A group of flags." in text
    assert "--kinds biases,norms Kinds of parameters. (default: biases)" in text
    assert "--rate FLOAT How fast. (default: 0.5)" in text
    assert "--names STR,… Names in order. (default: '')" in text
    assert "--counts INT,… Counts in order. (default: 1,2)" in text


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("--counts 0 1 2", "several values have commas between them: --counts=0,1,2"),
        ("--rate=1 --names a b --flag", "several values have commas between them: --names=a,b"),
        ("--flag=False", "it is --flag or --no-flag, without a value"),
        ("--flag true", "it is --flag or --no-flag, without a value"),
        ("--no-flag=1", "it is --flag or --no-flag, without a value"),
        ("--num-counts=3", "perhaps --counts"),
        ("--nothing-alike=3", "Unrecognized options: --nothing-alike=3 (python"),
        ("stray", "Unrecognized options: stray (python"),
        ("--rate 1 2", "Unrecognized options: 2 (python"),
    ],
)
def test_habits_from_other_programs_are_hinted_at(words, hint, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(*words.split())
    told = capsys.readouterr().err
    assert stopped.value.code == 2 and hint in told and told.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--lr=0.1", "--learning-rate"),
        ("--wd=0", "--weight-decay"),
        ("--bs=8", "--batch-size"),
        ("--num-epochs=3", "--epochs"),
        ("--num-workers=2", "--workers"),
        ("--dropout=0.1", "--dropout-rate"),
        ("--data=x", "--data-dir"),
    ],
)
def test_usual_names_of_flags_are_understood(word, meant, capsys):
    with pytest.raises(SystemExit):
        parse(training.Settings, "train", [word], training.RECIPES)
    assert f"perhaps {meant} (" in capsys.readouterr().err


@pytest.mark.parametrize("columns", ["1", "5", "20"])
def test_help_ends_on_the_narrowest_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        parsed("--help")
    assert "--counts" in capsys.readouterr().out


def test_help_that_nobody_reads_ends_silently(monkeypatch, capsys):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        with pytest.raises(SystemExit) as stopped:
            parsed("--help")
    assert not stopped.value.code and capsys.readouterr().err == ""


# Running


def test_main_gets_the_settings(monkeypatch, capsys):
    got = []
    run_with(monkeypatch, got.append, "--names=cat", "--rate=2")
    assert got == [Settings(Group(rate=2.0), names=("cat",))]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "error, code, line",
    [
        (CommandError("no such run"), 1, "error: no such run\n"),
        (CommandError("no\n run"), 1, "error: no run\n"),
        (
            CommandError("rate=2 is wrong with flag=True"),
            1,
            "error: --rate=2 is wrong with --flag\n",
        ),
        (CommandError("cats: rate=2"), 1, "error: cats: --rate=2\n"),
        (CommandError("a/rate=2 is --rate=2"), 1, "error: a/rate=2 is --rate=2\n"),
        (ValueError("rate=0.5 must be"), 1, "error: --rate=0.5 must be\n"),
        (ValueError("flag=False: no"), 1, "error: --no-flag: no\n"),
        (ValueError("counts=2 must be"), 1, "error: --counts=2 must be\n"),
        (ValueError("count=2 must be"), 1, "error: --counts=2 must be\n"),
        (ValueError("count=(1, 2): no"), 1, "error: --counts=1,2: no\n"),
        (OSError("disk\n  full\n"), 1, "error: disk full\n"),
        (FileNotFoundError(2, "Missing", "a/b"), 1, "error: [Errno 2] Missing: 'a/b'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_error_ends_with_its_code_and_one_line(error, code, line, monkeypatch, capsys):
    def main(_):
        raise error

    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stopped:
        run_with(monkeypatch, main)
    assert stopped.value.code == code
    assert capsys.readouterr() == ("", line)


def test_interrupt_while_modules_are_imported_ends_silently():
    command = [sys.executable, "-X", "importtime", "-m", "experiments.train"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not process.stderr.readline().endswith("| experiments\n"):
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
    assert process.returncode == -signal.SIGINT
    assert all(line.startswith("import time:") for line in errors.splitlines())


def use_more_than_there_is_in_numpy():
    np.zeros(2**62, np.uint8)


def use_more_than_there_is_in_jax():
    jax.numpy.zeros(2**46, np.uint8).block_until_ready()


@pytest.mark.parametrize("use", [use_more_than_there_is_in_numpy, use_more_than_there_is_in_jax])
def test_too_little_memory_is_told(use, monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_with(monkeypatch, lambda _: use())
    assert stopped.value.code == 1
    message = "error: there is too little memory \\(.*llocat.*\\): a smaller --batch-size .*\n"
    assert re.fullmatch(message, capsys.readouterr().err)


def test_wrong_flag_ends_with_2_before_main_runs(monkeypatch, capsys):
    got = []
    with pytest.raises(SystemExit) as stopped:
        run_with(monkeypatch, got.append, "--counts=x")
    assert (stopped.value.code, got) == (2, [])


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError(),
        ValueError("rate=0.25 must be"),  # the user gave 0.5
        ValueError("count=20 must be"),  # ... 1 and 2
        ValueError("axis=3 must be"),
        ValueError("shapes differ"),
    ],
    ids=str,
)
def test_bug_keeps_its_traceback(error, monkeypatch):
    def main(_):
        raise error

    with pytest.raises(type(error)) as raised:
        run_with(monkeypatch, main)
    assert raised.value is error


@pytest.mark.parametrize(
    ("error", "line"),
    [(CommandError("no run"), "error: no run"), (ZeroDivisionError(), "ZeroDivisionError")],
)
def test_error_ends_one_of_several_processes_at_once(error, line, monkeypatch, capsys):
    def main(_):
        raise error

    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(ending, "GRACE", 0)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stopped:
        run_with(monkeypatch, main)
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_without_its_packages_a_command_says_what_to_install():
    # -S: Python leaves out the folder of what is installed.
    command = [sys.executable, "-S", "-m", "experiments.train"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        'error: the commands need more packages: pip install -e ".[experiments]"\n'
    )


CLOSED = """
import os, sys
sys.argv, sys.stdout, sys.stderr = ["-m"], None, None
os.close(1), os.close(2)
import experiments
file = os.open(os.devnull, os.O_RDONLY)
print("unread"), print("unread", file=sys.stderr)
os._exit(3 if file < 3 or None in (sys.stdout, sys.stderr) else 0)
"""


def test_what_is_printed_into_closed_outputs_goes_nowhere():
    assert subprocess.run([sys.executable, "-c", CLOSED], cwd=ROOT).returncode == 0


# Output


def test_paths_of_a_home_are_found(monkeypatch, tmp_path):
    """The shell replaces ~ at the beginning of a word only."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found = parse(
        training.Settings, "train", ["--workdir=~/a/~b", "--data-dir", "~"], training.RECIPES
    )
    assert (found.workdir, found.data.data_dir) == (tmp_path / "a" / "~b", tmp_path)


def test_path_of_an_unknown_home_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse(training.Settings, "train", ["--workdir=~nobody-of-this-name/x"], training.RECIPES)
    told = capsys.readouterr().err
    assert "--workdir" in told and "~nobody-of-this-name/x" in told and told.count("\n") == 1


def test_output_is_left_as_it_was(tmp_path):
    check_output(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    check_output(tmp_path / "there")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


@pytest.mark.parametrize(
    "suffix", ["html", "json", "jsonl", "md", "onnx", "png", "safetensors", "stablehlo"]
)
def test_output_with_a_folder_in_the_place_of_a_file_is_refused(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").mkdir()
    with pytest.raises(CommandError, match=f"^output={tmp_path}: a.{suffix} is a folder, where"):
        check_output(tmp_path)


def test_output_that_is_no_folder_is_named(tmp_path):
    path, link = tmp_path / "taken", tmp_path / "link"
    path.write_text("kept")
    link.symlink_to("nowhere")
    for there, what in ((path, "a file"), (link, "a link that leads nowhere")):
        with pytest.raises(CommandError, match=f"^output={there} is {what}, not a folder$"):
            check_output(there)
        told = f"^output={there}/below cannot be made, since {there} is {what}"
        with pytest.raises(CommandError, match=told):
            check_output(there / "below")
    assert path.read_text() == "kept"


def test_output_that_cannot_be_made_is_named(tmp_path):
    for folder in (tmp_path / ("a" * 300), tmp_path / ("a" * 300) / "below", Path("/proc/new")):
        with pytest.raises(CommandError, match=f"^output={folder}: "):
            check_output(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"command": 3}'])
def test_results_of_unknown_origin_are_not_replaced(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    check_output(tmp_path)
    with pytest.raises(CommandError, match="the results of another command: an unknown one"):
        check_output(tmp_path, "scaling")


@pytest.mark.parametrize(
    ("command", "words", "told"),
    [
        (evaluate, ["--run=RUN"], "Missing: --workdir; --run=RUN is none of its flags (python"),
        (evaluate, [], "Missing: --workdir (python"),
        (study, [], "Missing: one of {overfit,underfit,"),
        (study, ["--name=rank"], "it stands alone, without --name="),
        (study, ["rank", "epochs=3"], "Unrecognized options: epochs=3; perhaps --epochs=3 (python"),
    ],
)
def test_what_is_missing_or_was_typed_in_its_place_is_named(command, words, told, capsys):
    with pytest.raises(SystemExit):
        parse(command.Settings, "command", words)
    assert told in capsys.readouterr().err
