"""What is told of an error in one line."""

import shutil
from pathlib import Path

import pytest

from experiments.cli.errors import in_a_line
from experiments.tune import Settings


def error_of(function, *arguments):
    with pytest.raises(Exception) as caught:  # noqa: PT011  any
        function(*arguments)
    return caught.value


def test_copy_that_fails_names_the_file(tmp_path):
    (tmp_path / "from" / "a").mkdir(parents=True)
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "a").touch()
    error = error_of(
        lambda: shutil.copytree(tmp_path / "from", tmp_path / "to", dirs_exist_ok=True)
    )
    assert "to/a: [Errno 17] File exists" in in_a_line(error, None)
    error = error_of(shutil.copy, tmp_path / "to" / "a", tmp_path / "to" / "a")
    assert "are the same file" in in_a_line(error, Settings())
    several = shutil.Error([("from/a", "to/a", "[Errno 28] No space left on device"), ("", "", "")])
    assert in_a_line(several, None) == "to/a: [Errno 28] No space left on device"


def test_path_that_cannot_be_a_path_is_named():
    error = error_of(Path("\ud800").resolve)
    assert in_a_line(error, None) == r"'\ud800' cannot be encoded: surrogates not allowed"


def test_platforms_that_are_not_there_are_named(monkeypatch):
    def backends():  # as JAX's own, where all platforms that were named have none
        raise AssertionError

    def another():
        raise AssertionError

    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    told = in_a_line(error_of(backends), None)
    assert told == "JAX_PLATFORMS=cuda: JAX finds no such devices here"
    assert in_a_line(error_of(another), None) is None
    monkeypatch.delenv("JAX_PLATFORMS")
    assert in_a_line(error_of(backends), None) is None
