import dataclasses
import json
import os
import pickle
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from chansel_jax import resnet14
from chansel_jax.digest import digest
from chansel_jax.functional import network_tree
from chansel_jax.training import checkpoint, devices
from chansel_jax.training.step import TrainState, init_state, init_totals

VAL_LOSSES = (5.0, 1.0, 3.0, 4.0, 5.0)


def make_state(seed):
    """A small state that has the structure of a real one: nested dicts with integer keys."""
    values = iter(np.random.default_rng(seed).normal(size=(6, 64)).astype(np.float32))
    params = {"blocks": {0: {"kernel": next(values)}, 1: {"kernel": next(values)}}}
    state = TrainState(
        params=params,
        batch_stats={"mean": next(values)},
        opt_state=({"mu": next(values)}, (), {"count": np.int32(seed)}),
        step=np.int32(seed),
        key=jax.random.key_data(jax.random.key(seed)),
    )
    return jax.device_put(state, NamedSharding(devices.data_mesh(), PartitionSpec()))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run of five epochs, of which 2 was the best."""
    workdir = tmp_path_factory.mktemp("saved")
    with checkpoint.open_checkpoints(workdir, print) as checkpoints:
        for epoch, val_loss in enumerate(VAL_LOSSES, 1):
            checkpoint.save(checkpoints, epoch, make_state(epoch), {"history": [epoch]}, val_loss)
    return workdir


@pytest.fixture
def directory(saved, tmp_path):
    """Its checkpoints, in a copy."""
    return shutil.copytree(saved, tmp_path / "run") / "checkpoints"


def restore(directory):
    """What is restored, and the lines reported."""
    lines = []
    with checkpoint.open_checkpoints(directory.parent, lines.append) as checkpoints:
        return newest(checkpoints, lines.append), lines


def newest(checkpoints, report=print, like=None):
    """State and record of the newest checkpoint, if there is one."""
    like, totals = like or make_state(0), init_totals(devices.data_mesh())
    found = checkpoint.restore_newest(checkpoints, like, totals, report)
    return found and (found[0], found[2])


def data_file(directory, epoch):
    """The largest file of those that hold small arrays and tell where the others are."""
    return max((directory / str(epoch) / "state" / "d").iterdir(), key=lambda p: p.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_a_digit(path):
    """The last digit of the file, or of all of its record that tells how the run has gone."""
    text, end = path.read_text(), path.read_text().find('"sha256"')
    place = max(text.rfind(digit, 0, end) for digit in "0123456789")
    path.write_text(f"{text[:place]}{(int(text[place]) + 1) % 10}{text[place + 1 :]}")


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def put_a_file_in_its_place(folder):
    shutil.rmtree(folder)
    folder.touch()


def write(content):
    return lambda path: path.write_text(content)


BAD_METRICS = ("[]", '{"val_loss": NaN}', "[" * 100_000)


def test_state_record_and_placement_come_back(directory):
    (state, record), lines = restore(directory)
    chex.assert_trees_all_equal(state, make_state(5))
    chex.assert_trees_all_equal_dtypes(state, make_state(5))
    assert state.step.sharding.is_fully_replicated and len(state.step.devices()) == 2
    assert record == {"history": [5]}
    assert lines == []


def test_last_two_and_best_are_kept(directory):
    assert sorted(path.name for path in directory.iterdir()) == ["2", "4", "5"]
    with checkpoint.open_checkpoints(directory.parent, print) as checkpoints:
        assert checkpoints["epoch"].best_step() == 2
    for epoch in (4, 5):
        shutil.rmtree(directory / str(epoch))
    chex.assert_trees_all_equal(restore(directory)[0][0], make_state(2))


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "new" / "checkpoints") == (None, [])


@pytest.mark.parametrize("name", ["a#b", "50%", "a%20b", "a|b", "{a,b}", "$HOME", "~", "a: b\n"])
def test_names_of_folders_are_taken_as_they_are(tmp_path, name):
    with checkpoint.open_checkpoints(tmp_path / name, print) as checkpoints:
        checkpoint.save(checkpoints, 1, make_state(1), {"history": [1]}, 1.0)
    (state, record), lines = restore(tmp_path / name / "checkpoints")
    chex.assert_trees_all_equal(state, make_state(1))
    assert record == {"history": [1]} and lines == []
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_paths_that_lead_up_are_followed_as_the_system_follows_them(tmp_path):
    (tmp_path / "deep" / "folder").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/folder")
    workdir = tmp_path / "link" / ".." / "run"
    with checkpoint.open_checkpoints(workdir, print) as checkpoints:
        checkpoint.save(checkpoints, 1, make_state(1), {"history": [1]}, 1.0)
    assert (tmp_path / "deep" / "run" / "checkpoints" / "1").is_dir()
    (state, _), lines = restore(workdir / "checkpoints")
    chex.assert_trees_all_equal(state, make_state(1))
    assert lines == []


@pytest.mark.parametrize("name", ["a*b", "a?b", "a[b]", "a[b", "a\\b", "caf\udce9"])
@pytest.mark.parametrize("below", ["", "run"])
def test_names_that_would_lose_checkpoints_are_refused(tmp_path, name, below):
    with (
        pytest.raises(checkpoint.CheckpointError, match="^workdir=.* must .* to be kept in it"),
        checkpoint.open_checkpoints(tmp_path / name / below, print),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("data", truncate),
        ("data", flip_a_bit),
        ("data", Path.unlink),
        ("state/manifest.ocdbt", flip_a_bit),
        ("state/manifest.ocdbt", Path.unlink),
        ("record/metadata", truncate),
        ("record/metadata", Path.unlink),
        ("record/metadata", change_a_digit),
        ("metrics/metrics", truncate),
        ("metrics/metrics", Path.unlink),
        ("metrics/metrics", change_a_digit),
        *(("metrics/metrics", write(content)) for content in BAD_METRICS),
        ("", empty),
        ("", put_a_file_in_its_place),
    ],
)
def test_damaged_newest_is_reported_and_the_one_before_used(directory, file, damage):
    damage(data_file(directory, 5) if file == "data" else directory / "5" / file)
    (state, record), lines = restore(directory)
    chex.assert_trees_all_equal(state, make_state(4))
    assert record == {"history": [4]}
    assert len(lines) == 1 and "checkpoint of epoch 5 is damaged" in lines[0]
    assert (directory / "damaged-5").exists() and not (directory / "5").exists()


def test_state_that_is_not_the_one_saved_is_damage(directory, monkeypatch):
    # Arrays that read well but differ from those saved: only the digest can tell.
    seen = []

    def digest_that_differs_once(tree):
        seen.append(tree)
        return digest(tree) if len(seen) > 1 else "another"

    monkeypatch.setattr(checkpoint, "digest", digest_that_differs_once)
    (state, _), lines = restore(directory)
    chex.assert_trees_all_equal(state, make_state(4))
    assert "digest" in lines[0]


def test_record_that_cannot_be_parsed_is_damage(directory):
    def parse(record):
        if record["history"] == [5]:
            raise ValueError("5 is too much")
        return record["history"][0]

    lines = []
    with checkpoint.open_checkpoints(directory.parent, print) as checkpoints:
        like, totals = make_state(0), init_totals(devices.data_mesh())
        found = checkpoint.restore_newest(checkpoints, like, totals, lines.append, parse)
    assert found[2] == 4 and len(lines) == 1 and "5 is damaged (5 is too much)" in lines[0]


def of_an_older_version(directory):
    """Takes from the records what these did not hold: only the state had a digest."""
    for path in directory.glob("*/record/metadata"):
        record = json.loads(path.read_text())
        del record["val_loss"], record["sha256"]
        path.write_text(json.dumps(record))


def test_checkpoints_of_an_older_version_are_read(directory):
    of_an_older_version(directory)
    (state, record), lines = restore(directory)
    chex.assert_trees_all_equal(state, make_state(5))
    assert record == {"history": [5]} and lines == []
    (directory / "5" / "metrics" / "metrics").write_text('{"val_loss": NaN}')
    (_, record), lines = restore(directory)
    assert record == {"history": [4]} and "no finite number" in lines[0]


@pytest.mark.parametrize("name", ["²", "٣", "02", "a_²"])
def test_folder_whose_name_is_no_number_is_let_be(directory, name):
    (directory / name).mkdir()
    (directory.parent / "unfinished" / name).mkdir(parents=True)
    (_, record), lines = restore(directory)
    assert record == {"history": [5]} and lines == []
    assert checkpoint.saved_numbers(directory) == [2, 4, 5] and (directory / name).exists()


def test_arrays_are_not_cut_into_parts_of_the_devices(tmp_path, monkeypatch):
    def cut(*_, **__):
        raise AssertionError("an array is cut")

    assert len(jax.devices()) == 2
    monkeypatch.setattr(jax.lax, "slice_in_dim", cut)
    with checkpoint.open_checkpoints(tmp_path, print) as checkpoints:
        checkpoint.save(checkpoints, 1, make_state(1), {}, 0.5)
        checkpoint.save_unfinished(checkpoints, make_state(2), init_totals(devices.data_mesh()), {})
    # Without this module it is read too.
    path = tmp_path / "checkpoints" / "1" / "state"
    found = ocp.StandardCheckpointer().restore(path)
    chex.assert_trees_all_equal(found["params"]["blocks"]["0"], make_state(1).params["blocks"][0])


def test_loss_that_is_not_finite_is_not_saved(tmp_path):
    with (
        checkpoint.open_checkpoints(tmp_path, print) as checkpoints,
        pytest.raises(ValueError, match="^val_loss=nan must be finite$"),
    ):
        checkpoint.save(checkpoints, 1, make_state(1), {}, float("nan"))


def test_training_goes_on_after_damage(directory):
    truncate(data_file(directory, 5))
    lines = []
    for _ in range(2):  # the second time a damaged-5 is already there
        with checkpoint.open_checkpoints(directory.parent, lines.append) as checkpoints:
            newest(checkpoints, lines.append)
            checkpoint.save(checkpoints, 5, make_state(55), {"history": []}, 0.5)
        (state, _), _ = restore(directory)
        chex.assert_trees_all_equal(state, make_state(55))
        truncate(data_file(directory, 5))
    restore(directory)
    assert {"damaged-5", "damaged-5-2"} <= {path.name for path in directory.iterdir()}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 90 GiB"),
        jax.errors.JaxRuntimeError("UNAVAILABLE: a task has stopped sending heartbeats"),
        ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"),
    ],
    ids=repr,
)
def test_what_no_checkpoint_is_to_blame_for_is_no_damage(directory, monkeypatch, error):
    before = sorted(directory.rglob("*"))

    def fail(*_):
        raise error

    monkeypatch.setattr(checkpoint, "_read_through", fail)
    with pytest.raises(type(error), match=str(error)):
        restore(directory)
    assert sorted(directory.rglob("*")) == before


def test_all_damaged_is_an_error(directory):
    for epoch in (2, 4, 5):
        truncate(data_file(directory, epoch))
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint under .*epoch 5: "):
        restore(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["2", "4", "5"]


def test_whole_checkpoint_within_an_epoch_stands_in_for_damaged_ones_after(directory):
    totals = init_totals(devices.data_mesh())
    with checkpoint.open_checkpoints(directory.parent, print) as checkpoints:
        checkpoint.save_unfinished(checkpoints, make_state(3), totals, {"history": [3]})
    assert restore(directory)[0][1] == {"history": [5]}  # of more steps
    for epoch in (2, 4, 5):
        truncate(data_file(directory, epoch))
    (state, record), lines = restore(directory)
    chex.assert_trees_all_equal(state, make_state(3))
    assert record == {"history": [3]}
    assert ["is damaged" in line for line in lines] == [True] * 3


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_in_place_of_its_files_are_not_executed(directory, tmp_path):
    pickled = pickle.dumps(Malicious(tmp_path / "executed"))
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        path.write_bytes(pickled)
    with pytest.raises(checkpoint.CheckpointError, match="can be restored"):
        restore(directory)
    assert sorted(path.name for path in directory.iterdir()) == ["2", "4", "5"]
    with pytest.raises(checkpoint.CheckpointError, match="cannot restore"):
        checkpoint.restore_network(directory, small_network(), epoch=5)
    assert not (tmp_path / "executed").exists()
    pickle.loads(pickled)
    assert (tmp_path / "executed").exists()


def test_state_of_another_structure_sets_nothing_aside(directory):
    state = make_state(0)
    other = dataclasses.replace(state, params={"kernel": jnp.zeros(3)})
    with (
        checkpoint.open_checkpoints(directory.parent, print) as checkpoints,
        pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint .*epoch 5.* do not match"),
    ):
        newest(checkpoints, like=other)
    assert sorted(path.name for path in directory.iterdir()) == ["2", "4", "5"]


def test_checkpoint_that_was_never_finished_is_ignored(directory):
    partial = directory / "6.orbax-checkpoint-tmp" / "metrics"
    partial.mkdir(parents=True)
    (partial / "metrics").touch()
    assert restore(directory)[0][1] == {"history": [5]}
    assert not partial.exists()  # nor does it stay


def test_save_does_not_see_later_changes(tmp_path):
    # The next step consumes the state, and the history grows, while a checkpoint is written.
    with checkpoint.open_checkpoints(tmp_path, print) as checkpoints:
        for epoch in (1, 2, 3):
            state, history = make_state(epoch), [epoch]
            checkpoint.save(checkpoints, epoch, state, {"history": history}, 1.0)
            history.append("later")
            jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)(state)
    (restored, record), _ = restore(tmp_path / "checkpoints")
    chex.assert_trees_all_equal(restored, make_state(3))
    assert record == {"history": [3]}


def small_network(width=4):
    return resnet14(blocks=(1,), width=width, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def network_run(tmp_path_factory):
    """A network's state, saved as epoch 1 (best) and, with parameters of zero, as epoch 2."""
    tmp_path = tmp_path_factory.mktemp("network")
    state = init_state(small_network(), optax.adam(1.0), 0, devices.data_mesh())
    zero = dataclasses.replace(state, params=jax.tree.map(jnp.zeros_like, state.params))
    with checkpoint.open_checkpoints(tmp_path / "run", print) as checkpoints:
        checkpoint.save(checkpoints, 1, state, {}, 1.0)
        checkpoint.save(checkpoints, 2, zero, {}, 2.0)
    return tmp_path / "run" / "checkpoints", state, zero


def test_network_gets_the_best_parameters_without_the_optimiser(network_run):
    directory, state, zero = network_run
    network = small_network()
    nnx.update(network, jax.tree.map(jnp.zeros_like, nnx.state(network)))
    assert checkpoint.restore_network(directory / ".." / directory.name, network) == 1
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(network, nnx.Param)), state.params)
    assert checkpoint.restore_network(directory, network, 2) == 2
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(network, nnx.Param)), zero.params)


def test_network_gets_the_averages_where_there_are_some(tmp_path):
    like = init_state(small_network(), optax.sgd(1.0), 0, devices.data_mesh(), ema=True)
    state = dataclasses.replace(like, ema=jax.tree.map(lambda leaf: leaf + 1, like.ema))
    with checkpoint.open_checkpoints(tmp_path, print) as checkpoints:
        checkpoint.save(checkpoints, 1, state, {}, 1.0)
    with checkpoint.open_checkpoints(tmp_path, print) as checkpoints:
        restored, *_ = newest(checkpoints, print, like)
    chex.assert_trees_all_equal(restored, state)
    network = small_network()
    checkpoint.restore_network(tmp_path / "checkpoints", network)
    chex.assert_trees_all_equal(network_tree(network), state.ema)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("metrics/metrics", change_a_digit),
        ("metrics/metrics", write("{}")),
        ("record/metadata", change_a_digit),
        ("", empty),
        ("", put_a_file_in_its_place),
    ],
)
def test_best_passes_over_what_is_damaged_and_names_it(network_run, tmp_path, file, damage):
    directory, network = shutil.copytree(network_run[0], tmp_path / "run"), small_network()
    for epoch, other in ((2, 1), (1, 2)):
        copy = shutil.copytree(directory, tmp_path / f"without-{epoch}")
        damage(copy / str(epoch) / file)
        lines = []
        assert checkpoint.restore_network(copy, network, report=lines.append) == other
        assert len(lines) == 1
        assert f"checkpoint of epoch {epoch} is damaged (" in lines[0]
        with pytest.warns(UserWarning, match=f"epoch {epoch} is damaged .* is passed over"):
            checkpoint.restore_network(copy, network)
    damage(copy / "2" / file)
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint .* restored \(epoch 2: "):
        checkpoint.restore_network(copy, network)


def test_a_network_of_changed_bytes_is_refused(tmp_path):
    """Larger arrays have no checksum of their own, and can be decoded after some changes."""
    network = small_network(width=32)
    state = init_state(network, optax.sgd(1.0), 0, devices.data_mesh())
    with checkpoint.open_checkpoints(tmp_path, print) as checkpoints:
        checkpoint.save(checkpoints, 1, state, {}, 1.0)
    directory, whole, refused = tmp_path / "checkpoints", network_tree(network), []
    file = max((directory / "1" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    for place in np.linspace(0, len(content) - 1, 16).astype(int):
        changed = bytearray(content)
        changed[place] ^= 8
        file.write_bytes(changed)
        try:
            checkpoint.restore_network(directory, network)
        except checkpoint.CheckpointError as error:
            refused.append(str(error))
        else:
            chex.assert_trees_all_equal(network_tree(network), whole)
    assert any("arrays are not those that were saved" in line for line in refused)
    assert all("\n" not in line and len(line) < 500 for line in refused)


def test_network_that_does_not_fit_is_refused(network_run):
    directory, _, _ = network_run
    with pytest.raises(checkpoint.CheckpointError, match=r"cannot restore .*shape"):
        checkpoint.restore_network(directory, small_network(width=8))
    network = small_network()
    for wrong, epoch in ((directory, 3), (directory / "none", None)):
        with pytest.raises(checkpoint.CheckpointError, match="holds no checkpoint"):
            checkpoint.restore_network(wrong, network, epoch)
