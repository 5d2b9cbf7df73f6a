"""Checkpoints of a run: all that knows orbax.

A checkpoint holds the training state and a record of the run so far (plain JSON). Of those after an
epoch the last two and the one of lowest validation loss are kept. One within an epoch holds that
epoch's totals too; the last is kept, in a folder of its own, under the number of its step. All are
written in the background; a checkpoint appears under its number only when it is complete.
"""

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from jax.experimental import multihost_utils
from jax.tree_util import DictKey
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from chansel_jax.digest import digest
from chansel_jax.training import Totals, TrainState, network_tree

CheckpointManager = ocp.CheckpointManager

LAST_KEPT = 2


class CheckpointError(Exception):
    """No checkpoint could be restored, or one not be written; one line."""


@contextlib.contextmanager
def open_checkpoints(
    directory: str | Path, report: Callable[[str], None]
) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints under `directory`, which is made if need be, within a `with`.

    Args:
        directory: where the checkpoints lie.
        report: takes one line for each checkpoint that had to be set aside as damaged.

    Raises:
        CheckpointError: in the end, if the last checkpoint could not be written.
    """
    _quieten_orbax()
    directory = Path(directory).absolute()
    for epoch in _saved_epochs(directory):
        # The manager reads all metrics when it opens, and fails as a whole if it cannot.
        try:
            _saved_val_loss(directory, epoch)
        except (OSError, ValueError, TypeError, KeyError) as error:
            _set_aside(directory, epoch, error, report)
    _wait_for_all("damaged checkpoints are set aside")
    keep = policies.AnyPreservationPolicy(
        [
            policies.LatestN(LAST_KEPT),
            policies.BestN(n=1, get_metric_fn=_val_loss, reverse=True),
        ]
    )
    options = ocp.CheckpointManagerOptions(
        preservation_policy=keep, best_fn=_val_loss, best_mode="min"
    )
    with _closing(ocp.CheckpointManager(directory, options=options)) as manager:
        yield manager


@contextlib.contextmanager
def open_unfinished(directory: str | Path) -> Iterator[ocp.CheckpointManager]:
    """The checkpoints within an epoch under `directory`; as `open_checkpoints`."""
    _quieten_orbax()
    options = ocp.CheckpointManagerOptions(preservation_policy=policies.LatestN(1))
    with _closing(ocp.CheckpointManager(Path(directory).absolute(), options=options)) as manager:
        yield manager


def save(
    manager: ocp.CheckpointManager, epoch: int, state: TrainState, record: dict, val_loss: float
) -> None:
    """Begins to save `state` and `record` (JSON) as the checkpoint of `epoch`.

    Both may change as soon as this returns.

    Raises:
        CheckpointError: if this one, or the one before, cannot be written; older ones stay.
    """
    with _refused_writes(manager):
        manager.save(epoch, args=_save_args(_tree(state), record), metrics={"val_loss": val_loss})


def save_unfinished(
    manager: ocp.CheckpointManager, state: TrainState, totals: Totals, record: dict
) -> None:
    """Begins to save what `save` does, and `totals`, as the checkpoint of the state's step.

    Raises:
        CheckpointError: as `save`.
    """
    tree = _tree(state) | {"totals": _tree(totals)}
    with _refused_writes(manager):
        manager.save(int(state.step), args=_save_args(tree, record), force=True)


def restore_latest(
    manager: ocp.CheckpointManager, like: TrainState, report: Callable[[str], None]
) -> tuple[TrainState, dict] | None:
    """The newest checkpoint that is whole: its state and record; None where there is none at all.

    Damaged ones that are newer are told to `report` and moved to `damaged-EPOCH` beside it.

    Args:
        manager: from `open_checkpoints`.
        like: a state of the same structure, shapes, dtypes and placement.
        report: takes one line for each damaged checkpoint.

    Raises:
        CheckpointError: if there are checkpoints, and none can be restored; all stay then.
    """
    failures: dict[int, Exception] = {}
    for epoch in sorted(manager.all_steps(), reverse=True):
        try:
            restored = restore(manager, epoch, like)
        except Exception as error:  # orbax has no exception of its own for a damaged file
            failures[epoch] = error
            continue
        for damaged, error in failures.items():
            _set_aside(Path(manager.directory), damaged, error, report)
        _wait_for_all("damaged checkpoints are set aside")
        manager.reload()
        return restored
    if failures:
        newest, error = next(iter(failures.items()))
        raise CheckpointError(
            f"no checkpoint under {manager.directory} can be restored "
            f"(epoch {newest}: {_first_line(error)})"
        )
    return None


def restore(
    manager: ocp.CheckpointManager, epoch: int, like: TrainState
) -> tuple[TrainState, dict]:
    """State and record of the checkpoint of `epoch`.

    Raises:
        CheckpointError: if the state is not the one that was saved.
        Exception: whatever orbax raises for a checkpoint that is missing or cannot be read.
    """
    tree, record = _restore(manager, epoch, _tree(like))
    return TrainState(**tree), record


def restore_unfinished(
    manager: ocp.CheckpointManager, like: TrainState, totals: Totals, report: Callable[[str], None]
) -> tuple[TrainState, Totals, dict] | None:
    """State, totals and record of the newest checkpoint within an epoch, if there is one.

    Damaged ones are told to `report` and moved to `damaged-STEP` beside it.

    Args:
        manager: from `open_unfinished`.
        like: a state of the same structure, shapes, dtypes and placement.
        totals: likewise.
        report: takes one line for each damaged checkpoint.
    """
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            tree, record = _restore(manager, step, _tree(like) | {"totals": _tree(totals)})
            saved_totals = Totals(**tree.pop("totals"))
        except Exception as error:  # as above
            _set_aside(Path(manager.directory), step, error, report, "step")
            _wait_for_all("a damaged checkpoint is set aside")
            manager.reload()
            continue
        return TrainState(**tree), saved_totals, record
    return None


def discard(directory: Path) -> None:
    """Deletes the checkpoints under `directory`, damaged ones that were set aside excepted."""
    for path in directory.iterdir():
        if path.name.isdigit():
            shutil.rmtree(path)
    if not any(directory.iterdir()):
        directory.rmdir()


def restore_network(
    directory: str | Path, network: nnx.Module, epoch: int | Literal["best", "last"] = "best"
) -> int:
    """Gives `network` the parameters and batch statistics of a checkpoint.

    Args:
        directory: the `checkpoints` folder of a run.
        network: of the run's structure; it is changed in place.
        epoch: of the checkpoint; `"best"` (the default) is that of lowest validation loss, `"last"`
            the latest.

    Returns:
        The checkpoint's epoch.

    Raises:
        CheckpointError: if there is no such checkpoint, or it does not fit the network.
    """
    directory = Path(directory).absolute()
    epochs = _saved_epochs(directory)
    if not epochs:
        raise CheckpointError(f"{directory} holds no checkpoint")
    if epoch == "best":
        epoch = min(epochs, key=lambda e: _saved_val_loss(directory, e))
    elif epoch == "last":
        epoch = epochs[-1]
    if epoch not in epochs:
        raise CheckpointError(
            f"{directory} holds no checkpoint of epoch {epoch}, only {', '.join(map(str, epochs))}"
        )
    like = network_tree(network)
    path = directory / str(epoch) / "state"
    _quieten_orbax()
    try:
        _read_through(path)
        with ocp.PyTreeCheckpointer() as checkpointer:
            _check_shapes(checkpointer.metadata(path).item_metadata.tree, like)
            restored = checkpointer.restore(
                path,
                args=ocp.args.PyTreeRestore(
                    item=jax.tree.map(ocp.utils.to_shape_dtype_struct, like),
                    restore_args=ocp.checkpoint_utils.construct_restore_args(like),
                    partial_restore=True,
                ),
            )
    except Exception as error:  # orbax has no exception of its own for a damaged file
        raise CheckpointError(f"cannot restore {path} ({_first_line(error)})") from error
    nnx.update(network, restored["params"], restored["batch_stats"])
    return epoch


def _tree(state: TrainState | Totals) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


def _save_args(tree: dict[str, Any], record: dict) -> ocp.args.Composite:
    record = json.loads(json.dumps(record))  # it is written in the background
    return ocp.args.Composite(
        state=ocp.args.StandardSave(tree),
        record=ocp.args.JsonSave({"digest": digest(tree), "run": record}),
    )


def _restore(
    manager: ocp.CheckpointManager, number: int, like: dict[str, Any]
) -> tuple[dict[str, Any], dict]:
    _read_through(Path(manager.directory) / str(number) / "state")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restored = manager.restore(
        number,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore()
        ),
    )
    tree, record = restored["state"], restored["record"]
    if digest(tree) != record["digest"]:
        raise CheckpointError("the digest of its state differs from the one saved with it")
    return tree, record["run"]


def _val_loss(metrics: dict[str, float]) -> float:
    return metrics["val_loss"]


def _saved_epochs(directory: Path) -> list[int]:
    """The epochs of the finished checkpoints; one that is being written has another name."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit())


def _saved_val_loss(directory: Path, epoch: int) -> float:
    return json.loads((directory / str(epoch) / "metrics" / "metrics").read_bytes())["val_loss"]


def _check_shapes(stored: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises `ValueError` naming the first array of `wanted` that is not stored in its shape."""
    found = _shapes(stored)
    for name, shape in _shapes(wanted).items():
        if found.get(name) != shape:
            raise ValueError(f"{name} has shape {shape} here and {found.get(name)} there")


def _shapes(tree: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        ".".join(str(entry.key) for entry in path if isinstance(entry, DictKey)): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if hasattr(leaf, "shape")
    }


@contextlib.contextmanager
def _closing(manager: ocp.CheckpointManager) -> Iterator[ocp.CheckpointManager]:
    try:
        yield manager
    finally:
        with _refused_writes(manager):
            manager.close()


@contextlib.contextmanager
def _refused_writes(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax has none of its own for a disk that is full
        raise CheckpointError(
            f"cannot save under {manager.directory} ({_first_line(error)}); older checkpoints stay"
        ) from error


def _wait_for_all(what: str) -> None:
    """Waits until all processes have come to the same place."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _quieten_orbax() -> None:
    # Orbax reports every phase of every save; what went wrong reaches the caller as an exception.
    logging.getLogger("absl").setLevel(logging.CRITICAL)


def _first_line(error: Exception) -> str:
    return f"{(str(error).splitlines() or [type(error).__name__])[0]:.200}"


def _read_through(directory: Path) -> None:
    """Reads every stored value once, one after another, so that damage ends in one exception.

    Orbax reads them all at once, and a damaged file then ends in a traceback for each.
    """
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{directory}/"}).result()
    keys = store.list().result()
    if not keys:
        raise CheckpointError(f"{directory} holds no arrays")
    for key in keys:
        store.read(key).result()


def _set_aside(
    directory: Path,
    number: int,
    error: Exception,
    report: Callable[[str], None],
    what: str = "epoch",
) -> None:
    """Process 0 moves a checkpoint to the first free name `damaged-EPOCH`, `damaged-EPOCH-2`, …"""
    if jax.process_index() != 0:
        return
    target, attempt = directory / f"damaged-{number}", 2
    while target.exists():
        target, attempt = directory / f"damaged-{number}-{attempt}", attempt + 1
    (directory / str(number)).rename(target)
    report(f"checkpoint of {what} {number} is damaged ({_first_line(error)}); moved to {target}")
