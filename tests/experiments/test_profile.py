"""The profile of a training step, from real traces."""

import contextlib
import dataclasses
import json
import os
import re
import tempfile

import jax
import pytest

from chansel_jax.networks.resnet import PRESETS
from experiments import profile
from experiments.benchmarking.ceilings import Effort
from experiments.cli.errors import CommandError
from experiments.profile import Settings
from experiments.reporting.machine import with_variables

# Of jaxlib's own types, on Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type event.* has no __module__")


@pytest.fixture(autouse=True)
def a_small_copy(monkeypatch):
    monkeypatch.setattr(profile, "CPU_EFFORT", Effort(copy_bytes=2**22, seconds=0.01))


def test_prints_every_part_of_a_step_and_keeps_the_trace(tmp_path, capsys, monkeypatch):
    small = dataclasses.replace(PRESETS["resnet14"], blocks=(1,))
    monkeypatch.setitem(PRESETS, "resnet14", small)
    older = tmp_path / "traces" / "chansel" / "older.xplane.pb"
    older.parent.mkdir(parents=True)
    older.touch()
    os.utime(older, (2**31, 2**31))  # of a clock that was ahead
    profile.main(Settings(batch_size=8, steps=2, convs=("chansel",), output=tmp_path / "traces"))
    printed = capsys.readouterr().out
    for part in ("augmentation", "optimizer", "sums (BatchNorm)", "convolutions, matrix products"):
        assert part in printed, part
    assert "ms a step" in printed and jax.__version__ in printed
    assert re.search(
        r"a step must move \d+ MB at least, .*% of the step", " ".join(printed.split())
    )
    assert len(list((tmp_path / "traces" / "chansel").rglob("*.xplane.pb"))) == 2
    kept = json.loads((tmp_path / "traces" / "profile.json").read_text())
    command = "python -m experiments.profile --convs=chansel --batch-size=8 --steps=2"
    assert kept["command"] == with_variables(command)
    assert kept["bytes_per_second"] > 1e8
    touched = kept["bytes_touched"]["chansel"]
    found = kept["milliseconds"]["chansel"]
    assert set(touched) == set(found["kinds"]) and min(touched.values()) > 0
    assert found["step"] > 0 and min(found["kinds"].values()) > 0
    assert all(f"{ms:.2f}" in printed for ms in found["kinds"].values())
    # Each layer's forward and backward pass takes some time, and all parts make up the step.
    assert list(found["layers"])[1:3] == ["stem", "blocks.0.conv1"]
    for layer in ("stem.conv", "blocks.0.conv1", "blocks.0.conv2", "classifier"):
        assert layer in printed and min(found["layers"][layer]) > 0, layer
    parts = sum(sum(passes) for passes in found["layers"].values())
    assert parts == pytest.approx(sum(found["kinds"].values()))
    (took,) = found["took"]["chansel"]
    assert f"chansel {took}" in printed


def test_profile_of_one_layer(capsys):
    profile.main(Settings(layer="8x4x6x3x2", batch_size=4, steps=2, convs=("subkernel",)))
    printed = capsys.readouterr().out
    assert "layer 8² 4→6 3×3/2, batches of 4" in printed
    assert "convolutions, matrix products" in printed and "jvp()" in printed
    assert "optimizer" not in printed and "forward ms" not in printed


def test_places_where_no_trace_can_be_are_refused_before_anything_is_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(profile, "profile_step", lambda *_: pytest.fail("steps were taken"))
    (tmp_path / "chansel").touch()
    with pytest.raises(CommandError, match="chansel is a file, not a folder"):
        profile.main(Settings(convs=("chansel",), output=tmp_path))
    (tmp_path / "subkernel").symlink_to("nowhere")
    with pytest.raises(CommandError, match="subkernel is a link that leads nowhere"):
        profile.main(Settings(convs=("subkernel",), output=tmp_path))


def test_a_trace_that_cannot_be_written_is_told_in_a_line(tmp_path, monkeypatch):
    @contextlib.contextmanager
    def full(folder):
        yield
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no space left\nmore")

    monkeypatch.setattr(jax.profiler, "trace", full)
    with pytest.raises(
        CommandError, match=f"below {tempfile.gettempdir()}: RESOURCE_EXHAUSTED.*t$"
    ):
        profile.main(Settings(layer="4x1x1x1x1", batch_size=2, steps=1, convs=("chansel",)))


def test_a_batch_that_does_not_divide_by_the_devices_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(profile, "numpy_copy_rate", lambda *_: pytest.fail("copied"))
    with pytest.raises(ValueError, match="batch_size=9 must be divisible by the 2 devices"):
        profile.main(Settings(batch_size=9, convs=("chansel",)))
