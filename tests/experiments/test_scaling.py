"""The paper model in closed form, and a small measurement."""

import dataclasses
import io
import json
import re

import jax
import numpy as np
import pytest
from commands import processes
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from chansel_jax import resnet14
from chansel_jax.networks.resnet import CONVS
from chansel_jax.training import devices
from experiments import scaling
from experiments.cli.errors import CommandError
from experiments.parallelism import report, timing
from experiments.parallelism.allreduce import Link, all_reduces, efficiency, messages
from experiments.parallelism.report import Measured, Point

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


def test_arrays_are_messages_of_their_own_or_grouped():
    assert messages([[4, 8], [16]], grouped=False) == [4, 8, 16]
    assert messages([[4, 8], [16]], grouped=True) == [12, 16]


@pytest.mark.parametrize("weak", [True, False])
def test_efficiency_falls_with_devices_and_bytes(weak):
    over_devices = [efficiency(1e-3, [10**6], 2**i, LINK, weak) for i in range(1, 11)]
    over_bytes = [efficiency(1e-3, [10**i], 8, LINK, weak) for i in range(8)]
    for values in (over_devices, over_bytes):
        assert all(
            0 < after < before < 1 for before, after in zip(values, values[1:], strict=False)
        )


def test_all_reduces_of_a_sum_over_devices():
    mesh = devices.data_mesh()
    sharded = NamedSharding(mesh, PartitionSpec("data"))
    function = jax.jit(lambda x: x.sum(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
    images = jax.ShapeDtypeStruct((8, 5, 3), np.float32, sharding=sharded)
    assert all_reduces(function.lower(images).compile().as_text()) == [[5 * 3 * 4]]


def test_all_reduces_of_a_tuple_and_of_one_that_is_begun():
    text = """
      %a = (f32[9,16]{1,0}, /*index=1*/bf16[16]{0}) all-reduce(%x, %y), channel_id=1
      %b = s32[] all-reduce-start(%z), channel_id=2
      %c = s32[] all-reduce-done(%b)
      %d = f32[8]{0} all-gather(%w), channel_id=3"""
    assert all_reduces(text) == [[9 * 16 * 4, 16 * 2], [4]]


def measured(points, **others):
    """Batches of 2, over LINK."""
    given = {"link": LINK, "grouped": False, "assumed": LINK, **others}
    return Measured("resnet14", "a machine", 2, 1, 1, points, **given)


def test_prediction_by_hand():
    """A step of 20 ms, and a message of 1 GB: over two devices a second at 1 GB/s."""
    found = measured(
        [
            Point("chansel", 1, 100.0, 100.0, 100.0, []),
            Point("chansel", 2, 1.0, 1.0, 1.0, [[4 * 10**8, 6 * 10**8]]),
        ],
        assumed=Link(bandwidth=1e9, latency=0),
    )
    assert found.predicted("chansel", 2, "weak") == pytest.approx(0.02 / 1.02)
    assert found.predicted("chansel", 2, "strong") == pytest.approx(0.01 / 1.01)
    # Over four, two rounds each way, and three quarters twice.
    assert found.predicted("chansel", 4, "weak") == pytest.approx(0.02 / 1.52)
    assert found.predicted("chansel", 4, "strong") is None  # for two images


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The folder of a report of two processes, one device each, and what they printed."""
    folder = tmp_path_factory.mktemp("scaling") / "report"
    command = ["experiments.scaling", "--convs=chansel", "--blocks=1", "--batch-size=2"]
    command += ["--rounds=1", "--steps=1", f"--output={folder}"]
    with processes(command, count=2, devices=2) as both:
        outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    return folder, [printed for printed, _ in outputs]


def test_report_has_every_case_and_the_prediction(outcome):
    folder, (first, second) = outcome
    assert "2 virtual devices of 2 processes" in first and "written to" in first
    assert "virtual devices" not in second and "written to" not in second
    report = (folder / "report.md").read_text()
    assert "--num-processes=2 --process-id=0" in report
    rows = re.findall(r"^\| (chansel|subkernel) \| (\d) \|", report, re.MULTILINE)
    assert rows == [("chansel", "1"), ("chansel", "2")]
    assert "| 1,024 |" in report and "virtual devices" in report and "all-reduces" in report
    assert (folder / "efficiency.png").stat().st_size > 1000
    results = json.loads((folder / "results.json").read_text())
    variables, _, _ = results["command"].partition("python -m experiments.scaling")
    assert "XLA_FLAGS=" in variables  # as tests set them
    speeds = [point[kind] for point in results["points"] for kind in ("weak", "strong", "apart")]
    assert min(speeds) > 0 and results["link"]["latency"] > 0


def test_a_step_sends_the_gradients_and_batch_norms_sums(outcome):
    points = json.loads((outcome[0] / "results.json").read_text())["points"]
    assert [point["devices"] for point in points] == [1, 2]
    for point in points:
        network = resnet14(CONVS[point["conv"]], blocks=(1,), rngs=nnx.Rngs(0))
        parameters, normalised = (
            sum(leaf.size for leaf in jax.tree.leaves(nnx.state(network, kind)))
            for kind in (nnx.Param, nnx.BatchStat)
        )
        if point["devices"] == 1:
            assert point["sizes"] == []
        else:
            # Forward two sums of each normalised channel, for its mean and its variance (backward
            # those that are the gradients of scale and bias), and the totals.
            of_batch_norm = normalised
            sent = sum(messages(point["sizes"], grouped=True)) / 4
            assert 0 <= sent - parameters - of_batch_norm <= 16


def test_model_begins_with_the_devices_apart():
    """By hand: two devices that are half as fast together, and messages of no length."""
    slow = Point("chansel", 2, weak=80.0, strong=70.0, apart=100.0, sizes=[])
    points = [Point("chansel", 1, 100.0, 100.0, 100.0, []), slow]
    points += [Point("subkernel", 1, 10.0, 10.0, 10.0, [])]
    _, rows = report.measured_table(measured(points))
    of_two = ["2", "100", "0.50", "80", "0.40", "0.50", "70", "0.35", "0.50"]
    assert rows[1] == ["chansel", *of_two]
    # Messages that take as long as a step on its own, 2 images at 50 a second: a half of that.
    points[1] = dataclasses.replace(slow, sizes=[[int(0.04e9) - 2000]])
    _, rows = report.measured_table(measured(points))
    assert rows[1][6] == "0.25"


def test_what_several_devices_send_is_measured():
    """Within what any machine could do."""
    link = timing.measured_link(2, rounds=3, console=Console(file=io.StringIO()))
    assert 0 < link.latency < 0.5 and 1e6 < link.bandwidth < 1e12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"devices": (1,)}, "devices=1: it takes two"),
        ({"batch_size": 127}, "batch_size=127 must be divisible by 2"),
    ],
)
def test_too_many_or_few_devices_are_an_error(tmp_path, given, message):
    settings = scaling.Settings(**given, output=tmp_path / "none")
    with pytest.raises(CommandError, match=message):
        scaling.scale(settings, Console(file=io.StringIO()))
    assert not (tmp_path / "none").exists()
