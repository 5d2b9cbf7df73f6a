"""Checkpoints of a run: all that knows orbax.

A checkpoint holds the training state and a record of the run so far (plain JSON). The last two and
the one of lowest validation loss are kept. They are written in the background; a checkpoint appears
under its epoch's number only when it is complete.
"""

import dataclasses
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from jax.tree_util import DictKey
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from chansel_jax.training import TrainState, digest, network_tree

CheckpointManager = ocp.CheckpointManager

LAST_KEPT = 2


class CheckpointError(Exception):
    """No checkpoint could be restored."""


def open_checkpoints(directory: str | Path, report: Callable[[str], None]) -> ocp.CheckpointManager:
    """The checkpoints under `directory`, which is made if need be; close it (or use `with`).

    Args:
        directory: where the checkpoints lie.
        report: takes one line for each checkpoint that had to be set aside as damaged.
    """
    _quieten_orbax()
    directory = Path(directory).absolute()
    for epoch in _saved_epochs(directory):
        # The manager reads all metrics when it opens, and fails as a whole if it cannot.
        try:
            _saved_val_loss(directory, epoch)
        except (OSError, ValueError, TypeError, KeyError) as error:
            _set_aside(directory, epoch, error, report)
    keep = policies.AnyPreservationPolicy(
        [
            policies.LatestN(LAST_KEPT),
            policies.BestN(n=1, get_metric_fn=_val_loss, reverse=True),
        ]
    )
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            preservation_policy=keep, best_fn=_val_loss, best_mode="min"
        ),
    )


def save(
    manager: ocp.CheckpointManager, epoch: int, state: TrainState, record: dict, val_loss: float
) -> None:
    """Begins to save `state` and `record` (JSON) as the checkpoint of `epoch`.

    Both may change as soon as this returns.
    """
    record = json.loads(json.dumps(record))  # it is written in the background
    manager.save(
        epoch,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(_tree(state)),
            record=ocp.args.JsonSave({"digest": digest(_tree(state)), "run": record}),
        ),
        metrics={"val_loss": val_loss},
    )


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
    _read_through(Path(manager.directory) / str(epoch) / "state")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _tree(like))
    restored = manager.restore(
        epoch,
        args=ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract), record=ocp.args.JsonRestore()
        ),
    )
    state = TrainState(**restored["state"])
    if digest(restored["state"]) != restored["record"]["digest"]:
        raise CheckpointError("the digest of its state differs from the one saved with it")
    return state, restored["record"]["run"]


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


def _tree(state: TrainState) -> dict[str, Any]:
    return {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}


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
    directory: Path, epoch: int, error: Exception, report: Callable[[str], None]
) -> None:
    """Moves a checkpoint to the first free name `damaged-EPOCH`, `damaged-EPOCH-2`, …"""
    target, attempt = directory / f"damaged-{epoch}", 2
    while target.exists():
        target, attempt = directory / f"damaged-{epoch}-{attempt}", attempt + 1
    (directory / str(epoch)).rename(target)
    report(f"checkpoint of epoch {epoch} is damaged ({_first_line(error)}); moved to {target}")
