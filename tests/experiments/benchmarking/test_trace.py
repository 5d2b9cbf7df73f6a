"""What traces of compiled programs hold."""

import jax
import jax.numpy as jnp
import pytest

from experiments.benchmarking import trace

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
    assert trace.operations(COMPILED) == {
        "x.1": "x",
        "copy.3": "",
        "add_fusion": "jit(step)/add",
    }


def test_bytes_touched_by_hand():
    """Two float32 are 8 bytes: read and written 16, of which a parameter reads none."""
    assert trace.bytes_touched(COMPILED) == {"x.1": 8, "copy.3": 16, "add_fusion": 16}


def test_bytes_touched_of_several_results_and_of_other_dtypes():
    compiled = """HloModule jit_step

ENTRY %main.2 (x.1: bf16[4,8]) -> f32[2] {
  %x.1 = bf16[4,8]{1,0} parameter(0)
  %call.2 = (pred[3]{0}, f64[2,2]{1,0}, /*index=2*/s32[]) custom-call(%x.1, %x.1), api_version=1
  %one.3 = f64[2,2]{1,0} get-tuple-element(%call.2), index=1
  ROOT %last = u8[5]{0} fusion(%one.3, %x.1), kind=kLoop
}
"""
    of_call = 3 + 32 + 4
    assert trace.bytes_touched(compiled) == {
        "x.1": 64,
        "call.2": of_call + 2 * 64,
        "one.3": 32 + of_call,
        "last": 5 + 32 + 64,
    }


@pytest.mark.parametrize(
    ("op_name", "kind"),
    [
        ("jit(train_step)/jvp()/ffi_call", "convolutions, matrix products"),
        ("jit(train_step)/jvp(norm)/batch_norm/ffi_call", "BatchNorm, ReLU, sums in C++"),
        ("jit(train_step)/transpose(jvp())/conv_general_dilated", "convolutions, matrix products"),
        ("jit(train_step)/jvp()/dot_general", "convolutions, matrix products"),
        ("jit(train_step)/jvp()/custom_partitioning", "convolutions, matrix products"),
        ("jit(f)/transpose(jvp())/(reduce_sum:custom_partitioning)", "sums (BatchNorm)"),
        ("jit(train_step)/transpose(jvp())/reduce_sum", "sums (BatchNorm)"),
        ("jit(train_step)/jvp()/jit(relu)/max", "elementwise (BatchNorm, ReLU, …)"),
        ("jit(train_step)/optimizer/transpose", "optimizer"),
        ("jit(train_step)/augmentation/jit(_randint)/while", "augmentation"),
        ("", "transposes, copies"),
    ],
)
def test_kinds(op_name, kind):
    assert trace.kind_of(op_name) == kind


LAYERS = ("stem.conv", "blocks.0.conv1", "blocks.0.norm1", "blocks.10.conv1", "classifier")


@pytest.mark.parametrize(
    ("op_name", "layer"),
    [
        ("jit(train_step)/jvp(blocks.0)/conv1/ffi_call", "blocks.0.conv1"),
        ("jit(train_step)/transpose(jvp(blocks.0))/conv1/ffi_call", "blocks.0.conv1"),
        ("jit(train_step)/jvp()/blocks.10/conv1/add", "blocks.10.conv1"),
        ("jit(train_step)/jvp(stem)/conv/jit(_pad)/pad", "stem.conv"),
        ("jit(train_step)/jvp(blocks.0)/jit(relu)/max", "blocks.0"),
        ("jit(train_step)/jvp(blocks.1)/add", trace.ELSEWHERE),
        ("jit(train_step)/jvp(classifier)/dot_general", "classifier"),
        ("jit(train_step)/optimizer/add", trace.ELSEWHERE),
        ("jit(train_step)/add", trace.ELSEWHERE),
        ("", trace.ELSEWHERE),
    ],
)
def test_layer_of_an_operation(op_name, layer):
    assert trace.layer_of(op_name, LAYERS) == layer


def test_times_of_layers_worked_out_by_hand():
    op_names = {
        "a": "jit(f)/optimizer/add",
        "b": "jit(f)/transpose(jvp(blocks.0))/shortcut_norm/mul",
        "c": "jit(f)/jvp(blocks.0)/shortcut/ffi_call",
        "d": "jit(f)/transpose(jvp(blocks.0))/shortcut/ffi_call",
        "e": "jit(f)/transpose(jvp(blocks.0))/shortcut/reduce_sum",
        "f": "jit(f)/jvp(blocks.0)/add",
        "g": "jit(f)/jvp(stem)/conv/add",
    }
    milliseconds = dict(zip(op_names, (64, 32, 16, 8, 4, 2, 1), strict=True))
    touched = {name: 10 * ms for name, ms in milliseconds.items()}
    layers = ("stem.conv", "blocks.0.shortcut", "blocks.0.shortcut_norm", "classifier")
    assert trace.by_layer(trace.Profile(1.0, milliseconds, touched, op_names, layers, {})) == [
        ("stem.conv", (1, 10), (0, 0)),
        ("blocks.0.shortcut", (16, 160), (12, 120)),
        ("blocks.0.shortcut_norm", (0, 0), (32, 320)),
        ("blocks.0", (2, 20), (0, 0)),
        (trace.ELSEWHERE, (64, 640), (0, 0)),
    ]


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
    op_names = trace.operations(compiled.as_text())
    found = trace.times(tmp_path, op_names, 4)
    assert set(found) <= set(op_names) and all(value > 0 for value in found.values())
    touched = trace.bytes_touched(compiled.as_text())
    assert set(touched) == set(op_names)
    assert max(touched.values()) == 3 * 4 * 512**2  # of a product
    by_kind = {trace.kind_of(op_names[name]) for name in found}
    assert "convolutions, matrix products" in by_kind
