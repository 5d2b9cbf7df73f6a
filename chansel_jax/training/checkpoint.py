"""Checkpoints of a run: all that knows orbax.

A checkpoint holds the training state and a record of the run so far (plain JSON), each with a
digest by which damage is told. Of those after an epoch the last two and the one of lowest
validation loss are kept. One within an epoch holds that epoch's totals too; the last is kept, in a
folder of its own, under the number of its step. All are written in the background; a checkpoint
appears under its number only when it is complete.
"""

import contextlib
import gc
import json
import logging
import math
import operator
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from chansel_jax.digest import digest
from chansel_jax.errors import OneLineError
from chansel_jax.files import parse_json, read_json
from chansel_jax.functional import Tree, network_tree
from chansel_jax.training.processes import is_loss, together, wait_for_all
from chansel_jax.training.step import Totals, TrainState

# The folders, within that of a run, of its checkpoints after an epoch, and within one.
CHECKPOINTS, UNFINISHED = "checkpoints", "unfinished"
DAMAGED = "damaged-"
PATTERN = "*?[]\\"  # these stand for other characters in a pattern of paths
SEAL = "sha256"  # of a record: the digest of the rest of it

# Those of a run: after epochs by `"epoch"`, within epochs by `"step"`, which is what numbers them.
Checkpoints = Mapping[Literal["epoch", "step"], ocp.CheckpointManager]


class CheckpointError(OneLineError):
    """No checkpoint could be restored, or one could not be written."""


def check_workdir(workdir: str | Path, name: str = "workdir") -> None:
    """Holds that checkpoints can be kept in `workdir`, the argument `name`, or a folder to be.

    Orbax looks for what it has written by a pattern made of the path, so that what stands for
    other characters in one would lose the arrays; TensorStore takes text for a path.

    Raises:
        CheckpointError: if its absolute path is none that they take as it is.
    """
    path = str(_from_root(workdir))
    told = path.encode(errors="backslashreplace").decode()
    if told != path:
        raise CheckpointError(f"{name}={told} must be UTF-8 for checkpoints to be kept in it")
    if odd := sorted(set(path) & set(PATTERN)):
        raise CheckpointError(
            f"{name}={path} must have none of {' '.join(PATTERN)} in its path for checkpoints to "
            f"be kept in it, but has {' '.join(odd)}"
        )


def _from_root(path: str | Path) -> Path:
    """`path` from the root on, without `..`, which TensorStore refuses when it reads."""
    path = Path(path).absolute()
    return Path(os.path.realpath(path)) if ".." in path.parts else path


@contextlib.contextmanager
def open_checkpoints(workdir: str | Path, report: Callable[[str], None]) -> Iterator[Checkpoints]:
    """The checkpoints of the run in `workdir`, whose folders are made if need be, within a `with`.

    Args:
        workdir: the run's folder.
        report: takes one line for each checkpoint that had to be set aside as damaged.

    Raises:
        CheckpointError: if `check_workdir` does; if there are checkpoints, and none can be read;
            all stay then. In the end, if the last checkpoint could not be written.
    """
    check_workdir(workdir)
    workdir = _from_root(workdir)
    directory = workdir / CHECKPOINTS
    _set_aside_unknown_losses(directory, workdir / UNFINISHED, report)
    val_loss = operator.itemgetter("val_loss")
    best = policies.BestN(n=1, get_metric_fn=val_loss, reverse=True)
    keep = policies.AnyPreservationPolicy([policies.LatestN(2), best])
    with (
        _quiet(),
        _managed(directory, preservation_policy=keep, best_fn=val_loss, best_mode="min") as after,
        _managed(workdir / UNFINISHED, preservation_policy=policies.LatestN(1)) as within,
    ):
        yield {"epoch": after, "step": within}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within it orbax prints nothing: what goes wrong reaches the caller as an exception.

    It logs every phase of a save that fails, and leaves tasks behind. TensorStore tells them that
    it has written when their event loop is closed; others are collected without having begun.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, usual = [logger.level for logger in loggers], sys.unraisablehook

    def hook(unraisable):
        if str(unraisable.exc_value) != "Event loop is closed":
            usual(unraisable)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = hook
    try:
        yield
    except CheckpointError:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            gc.collect()
        raise
    finally:
        sys.unraisablehook = usual
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _set_aside_unknown_losses(
    directory: Path, within_epochs: Path, report: Callable[[str], None]
) -> None:
    """The manager reads all metrics when it opens, and fails as a whole if it cannot.

    It goes by them when it chooses what to keep.
    """
    losses, failures = _saved_val_losses(directory)
    wait_for_all("the metrics of checkpoints are read")
    _set_aside(failures, bool(losses or saved_numbers(within_epochs)), report)


def _set_aside(
    failures: Sequence[tuple[Path, str, int, Exception]], whole: bool, report: Callable[[str], None]
) -> None:
    """Process 0 moves damaged checkpoints, each to the first free of `damaged-NUMBER[-ATTEMPT]`.

    Args:
        failures: of each the folder, epoch or step, its number, and what is wrong; newest first.
        whole: whether there are others; if not, all stay.
        report: takes one line for each.

    Raises:
        CheckpointError: if there are no others.
    """
    if failures and not whole:
        raise CheckpointError(
            f"{_none_restored(failures[0])}; all are left as they are; a run in another folder "
            "begins anew"
        )
    for directory, kind, number, error in failures if jax.process_index() == 0 else ():
        target, attempt = directory / f"{DAMAGED}{number}", 2
        while target.exists():
            target, attempt = directory / f"{DAMAGED}{number}-{attempt}", attempt + 1
        (directory / str(number)).rename(target)
        report(
            f"checkpoint of {kind} {number} is damaged ({_first_line(error)}); moved to {target}"
        )
    wait_for_all("damaged checkpoints are set aside")


def _none_restored(failure: tuple[Path, str, int, Exception]) -> str:
    directory, kind, number, error = failure
    return (
        f"no checkpoint under {directory} can be restored ({kind} {number}: {_first_line(error)})"
    )


@contextlib.contextmanager
def _managed(directory: Path, **options: Any) -> Iterator[ocp.CheckpointManager]:
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add("record", ocp.args.JsonSave, _RecordHandler())
    # An array that every device holds is written whole, by one of them. By default each of them
    # writes a part, and the training waits until all of these many small parts have been cut.
    arrays = ocp.type_handlers.ArrayHandler(use_replica_parallel=False)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    state_handler = ocp.handlers.PyTreeCheckpointHandler(type_handler_registry=types)
    for of_state in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        handlers.add("state", of_state, state_handler)
    options = ocp.CheckpointManagerOptions(
        **options,
        cleanup_tmp_directories=True,  # of a process that was killed while it saved
        # Two managers that save at once must not wait for each other's processes.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
            barrier_sync_key_prefix=directory.name
        ),
    )
    manager = ocp.CheckpointManager(directory, options=options, handler_registry=handlers)
    try:
        yield manager
    finally:
        with _refused_writes(manager):
            manager.close()


def save(
    checkpoints: Checkpoints, epoch: int, state: TrainState, record: dict, val_loss: float
) -> None:
    """Begins to save `state`, of `jax.Array`, and `record` (JSON) as the checkpoint of `epoch`.

    Both may change as soon as this returns.

    Raises:
        ValueError: if `val_loss` is not finite.
        CheckpointError: if this one, or the one before, cannot be written; older ones stay.
    """
    if not math.isfinite(val_loss):
        raise ValueError(f"val_loss={val_loss} must be finite")
    manager, metrics = checkpoints["epoch"], {"val_loss": float(val_loss)}
    with _refused_writes(manager):
        manager.save(epoch, args=_save_args(_tree(state), record, **metrics), metrics=metrics)


def save_unfinished(
    checkpoints: Checkpoints, state: TrainState, totals: Totals, record: dict
) -> None:
    """Begins to save what `save` does, and `totals`, as the checkpoint of the state's step.

    Raises:
        CheckpointError: as `save`.
    """
    manager, tree = checkpoints["step"], _tree(state) | {"totals": _tree(totals)}
    with _refused_writes(manager):
        manager.save(int(state.step), args=_save_args(tree, record), force=True)


def restore_newest(
    checkpoints: Checkpoints,
    like: TrainState,
    totals: Totals,
    report: Callable[[str], None],
    parse: Callable[[Any], Any] = lambda record: record,
) -> tuple[TrainState, Totals, Any] | None:
    """The checkpoint of the most steps that is whole; None where there is none at all.

    Damaged ones that were tried are told to `report` and moved to `damaged-NUMBER` beside it.

    Args:
        checkpoints: from `open_checkpoints`.
        like: a state of the same structure, shapes, dtypes and placement.
        totals: likewise.
        report: takes one line for each damaged checkpoint.
        parse: makes of a record what is returned of it; if it raises an exception, the checkpoint
            is damaged.

    Returns:
        The state, the totals of the epoch under way (after an epoch the given ones), and the record
        that was saved with them.

    Raises:
        CheckpointError: if there are checkpoints, and none can be restored; all stay then.
    """
    steps, newest, failures = -1, None, []
    trees = {"epoch": _tree(like), "step": _tree(like) | {"totals": _tree(totals)}}
    for kind, manager in checkpoints.items():
        for number in sorted(manager.all_steps(), reverse=True):
            if number <= steps:
                break
            try:
                newest = _restore(manager, number, trees[kind], parse)
            except Exception as error:  # orbax has no exception of its own for a damaged file
                if is_loss(error) or isinstance(error, MemoryError):
                    raise
                failures.append((Path(manager.directory), kind, number, error))
            else:
                steps = int(newest[0]["step"])
                break
    _set_aside(failures, newest is not None, report)
    for manager in checkpoints.values() if failures else ():
        manager.reload()
    if newest is None:
        return None
    tree, record = newest
    totals = Totals(**tree.pop("totals")) if "totals" in tree else totals
    return TrainState(**tree), totals, record


def _restore(
    manager: ocp.CheckpointManager,
    number: int,
    like: dict[str, Any],
    parse: Callable[[Any], Any],
) -> tuple[dict[str, Any], Any]:
    """State, like `like`, and record of a checkpoint; any exception for one that is damaged."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    arguments = ocp.args.Composite(state=_restore_args(abstract))
    folder = Path(manager.directory) / str(number)

    def read():
        record = _saved_record(folder)
        state = manager.restore(number, args=arguments)["state"]
        if digest(state) != record.get("digest"):
            raise CheckpointError("the digest of its state differs from the one saved with it")
        return state, parse(record.get("run"))

    # Restoring is done together: a process that gave up alone would leave the others waiting.
    together(lambda: _read_through(folder / "state"))
    return together(read)


def discard_unfinished(workdir: Path) -> None:
    """Deletes the checkpoints within epochs, damaged ones that were set aside excepted."""
    directory = workdir / UNFINISHED
    for path in directory.iterdir():
        if path.is_dir() and not path.name.startswith(DAMAGED):
            shutil.rmtree(path)
    if not any(directory.iterdir()):
        directory.rmdir()


def restore_network(
    directory: str | Path,
    network: nnx.Module,
    epoch: int | Literal["best", "last"] = "best",
    report: Callable[[str], object] = warnings.warn,
) -> int:
    """Gives `network` the parameters and batch statistics of a checkpoint.

    Where the training kept moving averages, they are these.

    Args:
        directory: the `checkpoints` folder of a run.
        network: of the run's structure; it is changed in place.
        epoch: of the checkpoint; `"best"` (the default) is that of lowest validation loss, `"last"`
            the latest.
        report: takes one line for each checkpoint that `"best"` passes over, since its validation
            loss cannot be told; by default the line is a warning.

    Returns:
        The checkpoint's epoch.

    Raises:
        CheckpointError: if there is no such checkpoint, it does not fit the network, or its arrays
            are not those that were saved.
    """
    directory = _from_root(directory)
    epochs = saved_numbers(directory)
    if not epochs:
        raise CheckpointError(f"{directory} holds no checkpoint")
    if epoch == "best":
        losses, failures = _saved_val_losses(directory)
        if not losses:
            raise CheckpointError(_none_restored(failures[0]))
        for *_, number, error in failures:
            told = _first_line(error)
            report(f"checkpoint of epoch {number} is damaged ({told}) and is passed over")
        epoch = min(losses, key=losses.get)
    elif epoch == "last":
        epoch = epochs[-1]
    if epoch not in epochs:
        raise CheckpointError(
            f"{directory} holds no checkpoint of epoch {epoch}, only {', '.join(map(str, epochs))}"
        )
    path = directory / str(epoch)
    try:
        restored = _restored_network(path, network_tree(network))
    except Exception as error:  # orbax has no exception of its own for a damaged file
        raise CheckpointError(f"cannot restore {path} ({_first_line(error)})") from error
    nnx.update(network, restored["params"], restored["batch_stats"])
    return epoch


def _restored_network(checkpoint: Path, like: Tree) -> Tree:
    """What `network_tree` gives of a network like `like`; any exception for what is damaged."""
    path = checkpoint / "state"
    _read_through(path)
    with _quiet(), ocp.PyTreeCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata
        if metadata is None:
            raise CheckpointError("its metadata cannot be read")
        wanted = _in_stored_dtypes(like, _network_of(metadata.tree))
        wanted = {"ema": wanted} if "ema" in metadata.tree else wanted
        arguments = _restore_args(wanted, partial_restore=True)
        restored = _network_of(checkpointer.restore(path, args=arguments))
    # Of an older version of this module a record does not have it.
    if (saved := _saved_record(checkpoint).get("network_digest")) not in (None, digest(restored)):
        raise CheckpointError(f"its arrays are not those that were saved, of digest {saved}")
    return jax.tree.map(lambda array, own: array.astype(own.dtype), restored, like)


def _tree(dataclass: TrainState | Totals) -> dict[str, Any]:
    """What it has, by name; what is None is as if it were not there, as in older checkpoints."""
    return {name: value for name, value in vars(dataclass).items() if value is not None}


def _restore_args(like: Tree, **others: bool) -> ocp.args.PyTreeRestore:
    """Of arrays in the shapes, dtypes and placement of `like`."""
    how = ocp.checkpoint_utils.construct_restore_args(like)
    return ocp.args.PyTreeRestore(item=like, restore_args=how, **others)


def _save_args(tree: dict[str, Any], record: dict, **others: float) -> ocp.args.Composite:
    record = parse_json(json.dumps(record))  # it is written in the background
    return ocp.args.Composite(
        state=ocp.args.PyTreeSave(tree),
        record=ocp.args.JsonSave({"digest": jax.device_get(tree), "run": record, **others}),
    )


class _RecordHandler(ocp.handlers.JsonCheckpointHandler):
    """Saves the record; digests of a state, of its network, and of all else are taken meanwhile."""

    async def async_save(self, directory, item=None, args=None):
        async def write():
            if jax.process_index() == 0:
                tree = args.item["digest"]
                record = args.item | {
                    "digest": digest(tree),
                    "network_digest": digest(_network_of(tree)),
                }
                record[SEAL] = digest(json.dumps(record))
                (directory / "metadata").write_text(json.dumps(record))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="record")]


def _network_of(state: Mapping[str, Any]) -> Tree:
    """Of a training state the parameters and batch statistics that `restore_network` takes."""
    return state.get("ema") or {name: state[name] for name in ("params", "batch_stats")}


def saved_numbers(directory: Path) -> list[int]:
    """The numbers of the checkpoints in a folder; one that is being written has another name."""
    names = (path.name for path in directory.glob("*"))
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def _saved_val_losses(
    directory: Path,
) -> tuple[dict[int, float], list[tuple[Path, str, int, Exception]]]:
    """The validation losses by epoch, and those without one as `_set_aside` takes them."""
    losses, failures = {}, []
    for epoch in reversed(saved_numbers(directory)):
        try:
            losses[epoch] = _saved_val_loss(directory / str(epoch))
        except (OSError, ValueError) as error:
            failures.append((directory, "epoch", epoch, error))
    return dict(sorted(losses.items())), failures


def _saved_val_loss(checkpoint: Path) -> float:
    """From the metrics, which orbax goes by; the record, which has a digest, must say the same.

    That of an older version of this module does not say it.
    """
    metrics, record = read_json(checkpoint / "metrics" / "metrics"), _saved_record(checkpoint)
    val_loss = metrics.get("val_loss") if isinstance(metrics, dict) else None
    if not isinstance(val_loss, float) or not math.isfinite(val_loss):
        raise ValueError(f"val_loss={val_loss} of its metrics is no finite number")
    if val_loss != (saved := record.get("val_loss", val_loss)):
        raise ValueError(f"val_loss={val_loss} of its metrics is {saved} in its record")
    return val_loss


def _saved_record(checkpoint: Path) -> dict[str, Any]:
    """Raises OSError or ValueError if it cannot be read or is not what was saved.

    That of an older version of this module has no digest of its own.
    """
    record = read_json(checkpoint / "record" / "metadata")
    if not isinstance(record, dict):
        raise ValueError("its record is no JSON object")
    seal = record.pop(SEAL, None)
    if seal is not None and seal != digest(json.dumps(record)):
        raise ValueError("the digest of its record differs from the one saved with it")
    return record


def _in_stored_dtypes(wanted: Tree, stored: Tree) -> Tree:
    """Shapes and placement of `wanted`, in the dtypes in which its arrays are stored.

    Raises:
        ValueError: naming the first array that only one of both has, or in another shape.
    """
    own, there = _named(wanted), _named(stored)
    for name in [*own, *there]:
        here, other = (getattr(tree.get(name), "shape", None) for tree in (own, there))
        if here != other:
            raise ValueError(f"{name} has shape {here} here and {other} there")
    shapes = (
        jax.ShapeDtypeStruct(leaf.shape, there[name].dtype, sharding=leaf.sharding)
        for name, leaf in own.items()
    )
    return jax.tree.unflatten(jax.tree.structure(wanted), shapes)


def _named(tree: Tree) -> dict[str, Any]:
    """The leaves, by their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@contextlib.contextmanager
def _refused_writes(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # orbax has none of its own for a disk that is full
        if is_loss(error):
            raise
        raise CheckpointError(
            f"cannot save under {manager.directory} ({_first_line(error)}); older checkpoints stay"
        ) from error.with_traceback(None)  # whose frames would keep its tasks


def _first_line(error: Exception) -> str:
    """Of what `error` says, in the middle without what is too much: the reason comes last."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else f"{line[:100]} … {line[-100:]}"


def _read_through(directory: Path) -> None:
    """Reads and decodes every stored value, one by one, so that damage ends in one exception.

    Orbax reads them all at once, and a damaged file then ends in a traceback for each.
    """
    values = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{directory}/"}}
    # Without a cache the file that tells where all values are would be read anew for each.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 2**26}})
    store = tensorstore.KvStore.open(values, context=context).result()
    keys = store.list().result()
    if not keys:
        raise CheckpointError(f"{directory} holds no arrays")
    for key in keys:
        store.read(key).result()
    arrays = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
    for name in arrays:
        spec = {"driver": "zarr", "kvstore": values | {"path": f"{name}/"}}
        try:
            tensorstore.open(spec, context=context).result().read().result()
        except ValueError as error:
            raise CheckpointError(f"its array {name} cannot be decoded") from error
