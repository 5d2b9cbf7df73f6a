"""The profile of a training step, from real traces."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from chansel_jax.networks.resnet import PRESETS
from experiments import profile
from experiments.profile import Settings

# Of jaxlib's own types, on Python 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:builtin type event.* has no __module__")

COMPILED = """HloModule jit_step

%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %inner.1 = f32[2]{0} add(%p, %p), metadata={op_name="jit(step)/add"}
}

ENTRY %main.2 (x.1: f32[2]) -> f32[2] {
  %x.1 = f32[2]{0} parameter(0), metadata={op_name="x"}
  %copy.3 = f32[2]{0} copy(%x.1)
  ROOT %add_fusion = f32[2]{0} fusion(%copy.3), calls=%fused, metadata={op_name="jit(step)/add"}
}
"""


def test_operations_are_those_of_the_entry():
    assert profile.operations(COMPILED) == {
        "x.1": "x",
        "copy.3": "",
        "add_fusion": "jit(step)/add",
    }


@pytest.mark.parametrize(
    ("op_name", "kind"),
    [
        ("jit(train_step)/jvp()/ffi_call", "convolutions, matrix products"),
        ("jit(train_step)/transpose(jvp())/conv_general_dilated", "convolutions, matrix products"),
        ("jit(train_step)/jvp()/dot_general", "convolutions, matrix products"),
        ("jit(train_step)/transpose(jvp())/reduce_sum", "sums (BatchNorm)"),
        ("jit(train_step)/jvp()/jit(relu)/max", "elementwise (BatchNorm, ReLU, …)"),
        ("jit(train_step)/optimizer/transpose", "optimizer"),
        ("jit(train_step)/augmentation/jit(_randint)/while", "augmentation"),
        ("", "transposes, copies"),
    ],
)
def test_kinds(op_name, kind):
    assert profile.kind_of(op_name) == kind


def test_times_of_a_real_trace(tmp_path):
    @jax.jit
    def products(x):
        return jnp.sin(x @ x) @ x

    x = jnp.ones((512, 512))
    compiled = products.lower(x).compile()
    compiled(x).block_until_ready()
    with jax.profiler.trace(tmp_path):
        for _ in range(4):
            compiled(x).block_until_ready()
    op_names = profile.operations(compiled.as_text())
    found = profile.times(tmp_path, op_names, 4)
    assert set(found) <= set(op_names) and all(value > 0 for value in found.values())
    by_kind = {profile.kind_of(op_names[name]) for name in found}
    assert "convolutions, matrix products" in by_kind


def test_prints_every_part_of_a_step_and_keeps_the_trace(tmp_path, capsys, monkeypatch):
    small = dataclasses.replace(PRESETS["resnet14"], blocks=(1,))
    monkeypatch.setitem(PRESETS, "resnet14", small)
    profile.main(Settings(batch_size=8, steps=2, convs=("chansel",), output=tmp_path / "traces"))
    printed = capsys.readouterr().out
    for part in ("augmentation", "optimizer", "sums (BatchNorm)", "convolutions, matrix products"):
        assert part in printed, part
    assert "ms a step" in printed and jax.__version__ in printed
    assert list((tmp_path / "traces" / "chansel").rglob("*.xplane.pb"))
    kept = json.loads((tmp_path / "traces" / "profile.json").read_text())
    assert (
        kept["command"] == "python -m experiments.profile --convs=chansel --batch-size=8 --steps=2"
    )
    found = kept["milliseconds"]["chansel"]
    assert found["step"] > 0 and min(found["kinds"].values()) > 0
    assert all(f"{ms:.2f}" in printed for ms in found["kinds"].values())


def test_a_batch_that_does_not_divide_by_the_devices():
    with pytest.raises(ValueError, match="batch_size=9 must be divisible by the 2 devices"):
        profile.main(Settings(batch_size=9, convs=("chansel",)))
