"""The folder of a run: whose it is, and that no run is lost in it."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from chansel_jax.errors import OneLineError
from chansel_jax.files import read_json, write_json
from chansel_jax.training.checkpoint import CHECKPOINTS, UNFINISHED, saved_numbers
from experiments.cli.differences import differences
from experiments.training.settings import DataSettings, in_todays_names

DATA_DIR = "data_dir"  # of `config.json`; the rest decides the result


class WorkdirError(OneLineError):
    """The folder holds another run, or none to resume, or it cannot be written to."""


Resume = Literal["auto", "never", "must"]


def refuse_among_images(name: str, folder: Path, data: DataSettings) -> None:
    """Raises `WorkdirError` if what is written to `folder` would become part of a tree of images.

    Args:
        name: of the setting that `folder` is.
        folder: to be written to.
        data: which may be such a tree.
    """
    images = data.data_dir if data.dataset == "folder" else None
    if images is not None and folder.resolve().is_relative_to(images.resolve()):
        raise WorkdirError(f"{name}={folder} lies within the images of {images}")


def check(
    workdir: Path,
    config: Mapping[str, Any],
    resume: Resume,
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Raises what `claim` would, as far as that can be told of a part of `config`.

    It makes and changes nothing, and so costs nothing before the data are there.
    """
    if resume == "must" and not holds_run(workdir):
        raise WorkdirError(f"--resume=must: there is no run in {workdir}")
    if resume == "never" and holds_run(workdir) and workdir.samefile(Path.cwd()):
        # Renamed, it would still be where everything is written to.
        raise WorkdirError("--resume=never cannot rename the current folder: name its --workdir")
    with _refused_writes(workdir):
        there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if holds_run(workdir) and resume != "never":
        stored = filled(_read(workdir / "config.json"), defaults or {})
        _check_same(workdir, {name: stored.get(name) for name in config}, config)


@contextlib.contextmanager
def claim(
    workdir: Path,
    config: Mapping[str, Any],
    resume: Resume,
    defaults: Mapping[str, Any] | None = None,
    data_dir: Path | None = None,
) -> Iterator[Path | None]:
    """Makes `workdir` with `config.json`, or checks that the run in it has the same `config`.

    A context manager: within it no other process can claim the folder. (It locks the file `.lock`;
    the operating system unlocks it however the process ends.)

    Args:
        workdir: the run's folder.
        config: all that decides the run's result, as nested JSON.
        resume: `"auto"` goes on with a run that is there, `"must"` fails where there is none, and
            `"never"` renames the folder of a run that is there, to begin anew.
        defaults: values of what the `config.json` of an older run may not have yet.
        data_dir: where the images lie now, which `config.json` holds too, and nothing is compared
            with.

    Yields:
        What a folder that was there has been renamed to, or None.

    Raises:
        WorkdirError: if another process has claimed the folder; if it holds a run of another
            `config` (the message names all that differs), or, with `"must"`, none; nothing is
            touched then. Or if it cannot be written.
    """
    config = json.loads(json.dumps(config))
    check(workdir, {}, resume)
    with contextlib.ExitStack() as locks:
        aside = None
        _lock(workdir, locks)
        if holds_run(workdir) and resume == "never":
            aside = _rename_aside(workdir)
            _lock(workdir, locks)
        stored = _read(workdir / "config.json") if holds_run(workdir) else None
        if stored is not None:
            compared = {name: value for name, value in stored.items() if name != DATA_DIR}
            _check_same(workdir, filled(compared, defaults or {}), config)
        where = {DATA_DIR: str(data_dir.absolute())} if data_dir else {}
        content = (stored or config) | where
        if content != stored:
            with _refused_writes(workdir):
                write_json(workdir / "config.json", content)
        yield aside


def _check_same(workdir: Path, stored: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    if found := differences(stored, config):
        raise WorkdirError(
            f"the run in {workdir} has other settings ({'; '.join(found)}): "
            "take another --workdir, or --resume=never to start anew"
        )


def holds_run(workdir: Path) -> bool:
    """Whether there is something to resume in `workdir`, or a finished run to lose."""
    saved = any(saved_numbers(workdir / name) for name in (CHECKPOINTS, UNFINISHED))
    return saved or (workdir / "summary.json").is_file()


def filled(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Nested `config` with those of `defaults` that it lacks."""
    whole = {**defaults, **config}
    for name, value in defaults.items():
        if isinstance(value, Mapping) and isinstance(whole[name], Mapping):
            whole[name] = filled(whole[name], value)
    return whole


def _lock(workdir: Path, locks: contextlib.ExitStack) -> None:
    lock = FileLock(workdir / ".lock", blocking=False)
    with _refused_writes(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            locks.enter_context(lock)
        except Timeout as error:
            raise WorkdirError(
                f"another process is at work in {workdir}: take another folder, or wait for it"
            ) from error


@contextlib.contextmanager
def _refused_writes(workdir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkdirError(f"cannot write to --workdir={workdir}: {error.strerror}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path)
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read ({error}): take another --workdir") from error
    return in_todays_names(config)


def _rename_aside(workdir: Path) -> Path:
    """Renames `workdir` to the first free of `WORKDIR.1`, `WORKDIR.2`, …

    A link stays, and leads to the new run on the same disk: what it leads to is renamed.
    """
    real, number = workdir.resolve() if workdir.is_symlink() else workdir, 1
    while (aside := real.with_name(f"{real.name}.{number}")).exists():
        number += 1
    real.rename(aside)
    real.mkdir(exist_ok=True)  # another process may have
    return aside
