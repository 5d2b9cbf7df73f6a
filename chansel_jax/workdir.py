"""The folder of a run: whose it is, and that no run is lost in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from chansel_jax.records import write_json


class WorkdirError(Exception):
    """The folder holds another run, or none to resume; one line."""


def claim(
    workdir: Path, config: Mapping[str, Any], resume: Literal["auto", "never", "must"]
) -> Path | None:
    """Makes `workdir` with `config.json`, or checks that the run in it has the same `config`.

    Args:
        workdir: the run's folder.
        config: all that decides the run's result, as nested JSON.
        resume: `"auto"` goes on with a run that is there, `"must"` fails where there is none, and
            `"never"` renames the folder of a run that is there, to begin anew.

    Returns:
        What a folder that was there has been renamed to, or None.

    Raises:
        WorkdirError: if the folder holds a run of another `config` (the message names all that
            differs), or, with `"must"`, none; nothing is touched then. Or if it cannot be written.
    """
    config = json.loads(json.dumps(config))
    path = workdir / "config.json"
    aside = None
    # Without a checkpoint there is nothing to resume, and without a summary nothing to lose.
    saved = any(entry.name.isdigit() for entry in (workdir / "checkpoints").glob("*"))
    holds_run = saved or (workdir / "summary.json").is_file()
    if holds_run and resume == "never":
        aside = _rename_aside(workdir)
    elif holds_run:
        found = differences(_read(path), config)
        if found:
            raise WorkdirError(
                f"the run in {workdir} has other settings ({'; '.join(found)}): "
                "take another --workdir, or --resume=never to start anew"
            )
        return None
    elif resume == "must":
        raise WorkdirError(f"--resume=must: there is no run in {workdir}")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(path, config)
    except OSError as error:
        raise WorkdirError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    return aside


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One `name: before → now` for each entry in which two nested mappings differ."""
    found = []
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new)
        elif old != new:
            found.append(f"{name}: {old} → {new}")
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{path} cannot be read ({error}): take another --workdir") from error
    return config


def _rename_aside(workdir: Path) -> Path:
    """Renames `workdir` to the first free of `WORKDIR.1`, `WORKDIR.2`, …"""
    workdir, number = workdir.absolute(), 1
    while (aside := workdir.with_name(f"{workdir.name}.{number}")).exists():
        number += 1
    return workdir.rename(aside)
