"""What all commands share: settings from flags, errors as one line, and the folder of --output."""

import contextlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from chansel_jax.files import read_json
from chansel_jax.memory import keep_freed_memory
from chansel_jax.ops import native
from experiments.cli.compiled import keep_compiled
from experiments.cli.console import print_any_character
from experiments.cli.ending import (
    EXIT_ERROR,
    EXIT_INTERRUPTED,
    EXIT_SAVED,
    end_at_once,
    end_before_others,
    handle_interrupts,
    print_error,
    say,
)
from experiments.cli.errors import CommandError, Interrupted, in_a_line
from experiments.cli.flags import Settings, parse


def run(
    main: Callable[[Settings], object],
    settings_type: type[Settings],
    name: str,
    recipes: Mapping[str, object] | None = None,
    read_config: Callable[[Path], Mapping[str, Any]] | None = None,
) -> None:
    """Calls `main` with settings read from the command line.

    An error that `in_a_line` tells ends the program with that line on the standard error and exit
    code 1, a wrong flag likewise with 2, an interruption by the user with 130, or with 75 where a
    run was saved. An error in one of several processes ends the others too.

    Args:
        main: the command.
        settings_type: a dataclass; nested ones become groups of flags.
        name: the command's name in `python -m experiments.NAME`.
        recipes: as in `parse`.
        read_config: likewise.
    """
    keep_freed_memory()
    keep_compiled()
    handle_interrupts()
    print_any_character()
    try:
        _call(main, parse(settings_type, name, recipes=recipes, read_config=read_config))
    except Interrupted as stop:
        if str(stop):
            say(str(stop))
        sys.exit(EXIT_SAVED)
    except KeyboardInterrupt:
        say("interrupted")
        end_at_once(EXIT_INTERRUPTED)


def _call(main: Callable[[Settings], object], settings: Settings) -> None:
    try:
        if jax.config.jax_disable_jit:
            raise CommandError("JAX_DISABLE_JIT=1 must not be set: commands compile what they run")
        native.available()  # or the environment variable that limits it is wrong
        with jax.transfer_guard("allow"):  # to be disallowed within steps
            main(settings)
    except Interrupted:
        raise
    except Exception as error:
        told = in_a_line(error, settings)
        if told is not None:
            print_error(told)
        elif jax.distributed.is_initialized():
            traceback.print_exc()
        else:
            raise
        if jax.distributed.is_initialized():  # else they would wait for this one
            end_before_others(EXIT_ERROR)
        sys.exit(EXIT_ERROR)


# Suffixes of all files that are written.
RESULTS = {
    *(".json", ".jsonl", ".md", ".html", ".png"),
    *(".onnx", ".safetensors", ".stablehlo"),
}


def check_output(folder: Path, command: str = "") -> None:
    """Checks that results can be written to the folder of --output, before anything long begins.

    Nothing is made: only what has results makes it.

    Args:
        folder: that is named or the default.
        command: what writes `results.json` to it, as in `"scaling"` or `"study rank"`; by default
            nothing does.

    Raises:
        CommandError: if it is a file, cannot be made or written to, holds a folder that is called
            as a file of results is, or the `results.json` of another command.
    """
    there = next(path for path in (folder, *folder.parents) if _is_something(path))
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            folder.lstat()  # raises other errors where, say, a name is too long
        if not there.is_dir():
            what = "a link that leads nowhere" if there.is_symlink() else "a file"
            where = "is" if there == folder else f"cannot be made, since {there} is"
            raise CommandError(f"output={folder} {where} {what}, not a folder")
        with tempfile.TemporaryFile(dir=there):
            pass
        for path in folder.iterdir() if there == folder else ():
            if path.suffix in RESULTS and path.is_dir():
                raise CommandError(f"output={folder}: {path.name} is a folder, where files are put")
    except OSError as error:
        raise CommandError(f"output={folder}: {error.strerror or error}") from error
    if command and (folder / "results.json").exists():
        other = _command_of(folder / "results.json")
        if not f"{other} ".startswith(f"{command} "):
            raise CommandError(f"output={folder} holds the results of another command: {other}")


def _is_something(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError:  # no folder below it can be looked into either
        return False


def _command_of(results: Path) -> str:
    """The command that wrote this `results.json`, with its flags, as far as that can be told."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        command = read_json(results).get("command", "").partition("python -m experiments.")[2]
        return command or "an unknown one"
    return "an unknown one"
