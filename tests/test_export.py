"""Modules as programs, read again from their bytes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from chansel_jax import ChannelSelectionConv
from chansel_jax.export import load_stablehlo, save_stablehlo, to_stablehlo
from chansel_jax.ops.lowerings import runnable
from chansel_jax.ops.selection import LOWERINGS


class UNet(nnx.Module):
    """One step down and one up, which needs images of an even size."""

    def __init__(self, rngs):
        self.down = nnx.Conv(3, 4, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.up = ChannelSelectionConv(7, 2, (3, 3), rngs=rngs)

    def __call__(self, x):
        y = self.dropout(nnx.relu(self.norm(self.down(x))))
        y = jnp.repeat(jnp.repeat(y, 2, axis=1), 2, axis=2)
        return self.up(jnp.concatenate([x, y], axis=-1))


class Counting(nnx.Module):
    """A recurrent network, dropout that stays, and a count of the calls: variables are written."""

    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(3, 4, rngs=rngs))
        self.dropout = nnx.Dropout(0.5, deterministic=False, rngs=rngs)
        self.calls = nnx.Intermediate(jnp.int32(0))

    def __call__(self, x):
        self.calls[...] += 1
        return self.dropout(self.rnn(x))


def reloaded(program, path):
    save_stablehlo(program, path)
    return load_stablehlo(path)


def test_a_network_that_is_not_ours_for_images_of_any_even_size(tmp_path):
    network = UNet(nnx.Rngs(0))
    shape, mean, std = ("n", "2*h", "2*w", 3), [120.0, 110.0, 100.0], [60.0, 50.0, 40.0]
    program = to_stablehlo(network, shape, dtype=jnp.uint8, mean=mean, std=std)
    assert program.platforms == ("cpu", "cuda", "tpu") and "@chansel" not in program.mlir_module()
    assert not network.norm.use_running_average and not network.dropout.deterministic
    program = reloaded(program, tmp_path / "unet.stablehlo")
    network.eval()
    for size in ((2, 4, 6, 3), (1, 8, 2, 3)):
        images = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        expected = network(jnp.asarray((images - np.array(mean)) / np.array(std), jnp.float32))
        np.testing.assert_allclose(program.call(images), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="divisible|Division"):
        program.call(np.zeros((1, 5, 4, 3), np.uint8))


def test_a_module_that_writes_variables_is_exported_and_stays_as_it_is():
    network, x = Counting(nnx.Rngs(0)), jnp.ones((2, 5, 3))
    program = to_stablehlo(network, (None, 5, 3), platforms=("cpu",))
    assert network.calls[...] == 0 and not network.dropout.deterministic
    network.eval()
    np.testing.assert_allclose(program.call(x), network(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", [False, True])
def test_deep_networks_are_exported_for_images_of_any_size(norm):
    """After each further layer JAX took ten times as long to compare what sizes may be."""
    rngs, channels = nnx.Rngs(0), [3, 4, 4, 4, 4, 4]
    network = nnx.Sequential(
        *[
            ChannelSelectionConv(i, o, (3, 3), strides=2, padding=1, norm=norm, rngs=rngs)
            for i, o in itertools.pairwise(channels)
        ]
    )
    program = to_stablehlo(network, (None, None, None, 3), platforms=("cpu",))
    network.eval()
    for shape in ((2, 40, 33, 3), (1, 5, 64, 3)):
        x = np.random.default_rng(0).standard_normal(shape, np.float32)
        expected = nnx.jit(lambda network, x: network(x))(network, x)
        np.testing.assert_allclose(program.call(x), expected, rtol=0, atol=1e-5)


class Doubled(nnx.Module):
    def __call__(self, x):
        return 2 * x


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, [[6, 8]]),
        ({"mean": [1, 2]}, [[4, 4]]),
        ({"mean": [1, 2], "std": [2, 4]}, [[2, 1]]),
        ({"mean": 1, "std": 2}, [[2, 3]]),
    ],
)
def test_normalisation_by_hand(given, expected):
    program = to_stablehlo(Doubled(), (None, np.int64(2)), platforms=("cpu",), **given)
    found = program.call(np.array([[3, 4]], np.float32))
    assert found.dtype == jnp.float32 and found.tolist() == expected


@pytest.mark.parametrize("lowering", ["auto", *runnable(LOWERINGS)])
def test_layers_that_ask_for_a_lowering_are_exported_without_what_is_in_cpp(lowering):
    layer = ChannelSelectionConv(2, 4, (3, 3), lowering=lowering, rngs=nnx.Rngs(0))
    program = to_stablehlo(layer, (1, 4, 4, 2))
    assert "custom_call" not in program.mlir_module() and layer.lowering == lowering
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 2))
    np.testing.assert_allclose(program.call(x), layer(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "given", "message"),
    [
        ((None, 0), {}, r"shape=\(None, 0\) must have sizes above 0"),
        ((None, 2.0), {}, r"shape=\(None, 2.0\) must have sizes above 0"),
        ((None, 2), {"std": 2}, "std=2 needs mean"),
        ((None, 2), {"mean": [1, 2, 3]}, r"mean=\[1. 2. 3.\] must be one number for each channel"),
        ((None, 2), {"mean": 1, "std": [1, 0]}, r"std=\[1. 0.\] must be above 0"),
        ((None, 2), {"platforms": ("gpu",)}, r"platforms=\('gpu',\) must be some of 'cpu'"),
        ((None, True), {}, r"shape=\(None, True\) must have sizes above 0"),
        ((), {}, r"shape=\(\) must be a sequence of one size or more"),
        (32, {}, "shape=32 must be a sequence of one size or more"),
    ],
)
def test_wrong_arguments_are_named(shape, given, message):
    with pytest.raises(ValueError, match=message):
        to_stablehlo(Doubled(), shape, **given)


def test_functions_are_no_modules():
    with pytest.raises(TypeError, match="must be an nnx.Module"):
        to_stablehlo(jnp.sin, (None, 2))


def test_modules_are_no_programs_and_other_files_hold_none(tmp_path):
    with pytest.raises(TypeError, match="program of type Doubled must be one of to_stablehlo"):
        save_stablehlo(Doubled(), tmp_path / "a")
    assert not (tmp_path / "a").exists()
    for content in (b"", b"text", b"x" * 1000):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match="path=.*a holds no StableHLO program"):
            load_stablehlo(tmp_path / "a")
