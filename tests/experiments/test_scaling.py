"""The paper model in closed form, and a small measurement."""

import io
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from chansel_jax import resnet14, training
from chansel_jax.resnet import CONVS
from experiments import scaling
from experiments.allreduce import Link, all_reduces, efficiency
from experiments.command_line import CommandError

LINK = Link(bandwidth=1e9, latency=1e-6)


def test_all_reduce_by_hand():
    # Two devices: one round each way of a microsecond, and half of the bytes twice.
    assert LINK.all_reduce(1000, 2) == pytest.approx(2e-6 + 1e-6)
    # Eight: three rounds each way, and seven eighths twice.
    assert LINK.all_reduce(8000, 8) == pytest.approx(6e-6 + 14e-6)


def test_efficiency_by_hand():
    assert efficiency(3e-6, [1000], 2, LINK, weak=True) == pytest.approx(0.5)
    assert efficiency(6e-6, [1000], 2, LINK, weak=False) == pytest.approx(0.5)
    assert efficiency(6e-6, [1000, 1000], 2, LINK, weak=True) == pytest.approx(0.5)


@pytest.mark.parametrize("weak", [True, False])
def test_efficiency_falls_with_devices_and_bytes(weak):
    over_devices = [efficiency(1e-3, [10**6], 2**i, LINK, weak) for i in range(1, 11)]
    over_bytes = [efficiency(1e-3, [10**i], 8, LINK, weak) for i in range(8)]
    for values in (over_devices, over_bytes):
        assert all(
            0 < after < before < 1 for before, after in zip(values, values[1:], strict=False)
        )


def test_all_reduces_of_a_sum_over_devices():
    mesh = training.data_mesh()
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    function = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    images = jax.ShapeDtypeStruct((8, 5, 3), np.float32, sharding=sharded)
    assert all_reduces(function.lower(images).compile().as_text()) == [5 * 3 * 4]


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    output = tmp_path_factory.mktemp("scaling")
    return scaling.Settings(devices=(2,), batch_size=2, rounds=1, steps=1, output=output)


@pytest.fixture(scope="module")
def points(settings):
    console = Console(file=io.StringIO(), width=120)
    return scaling.scale(settings, console), console.file.getvalue()


def test_a_step_sends_the_gradients_and_batch_norms_sums(points):
    sums = set()
    for point in points[0]:
        network = resnet14(CONVS[point.conv], rngs=nnx.Rngs(0))
        parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, nnx.Param)))
        if point.devices == 1:
            assert point.sizes == ()
        else:
            sums.add(sum(point.sizes) - 4 * parameters)
    (of_batch_norm,) = sums  # the same for both convolutions
    # Three sums of each of the 544 normalised channels, forward and backward, and the totals.
    assert 3 * 544 * 4 <= of_batch_norm <= 3 * 544 * 4 + 64


def test_report_has_every_case_and_the_prediction(settings, points):
    report = (settings.output / "report.md").read_text()
    rows = re.findall(r"^\| (chansel|subkernel) \| (\d) \|", report, re.MULTILINE)
    assert rows == [("chansel", "1"), ("chansel", "2"), ("subkernel", "1"), ("subkernel", "2")]
    assert "| 1,024 |" in report and "virtual devices" in report and "all-reduces" in report
    assert (settings.output / "efficiency.png").stat().st_size > 1000
    results = json.loads((settings.output / "results.json").read_text())
    assert [point["weak"] > 0 for point in results["points"]] == [True] * 4
    assert "written to" in points[1]


@pytest.mark.parametrize(
    ("devices", "message"),
    [((64,), "devices=64 must be at most the 2"), ((1,), "devices=1: .* two at least")],
)
def test_too_many_or_few_devices_are_an_error(tmp_path, devices, message):
    settings = scaling.Settings(devices=devices, output=tmp_path / "none")
    with pytest.raises(CommandError, match=message):
        scaling.scale(settings, Console(file=io.StringIO()))
    assert not (tmp_path / "none").exists()
