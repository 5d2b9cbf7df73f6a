"""Settings from flags, and flags from settings."""

import argparse
import contextlib
import dataclasses
import inspect
import io
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from chansel_jax.files import is_address
from experiments.cli.ending import EXIT_USAGE, discard_output, print_error

Settings = TypeVar("Settings")


NARROWEST = 40  # columns: in fewer tyro may never end with wrapping its help
UNKNOWN = "Unrecognized options: "  # as tyro begins

# These decide where results go and when, and none of them.
WRITTEN = ("output", "workdir", "resume", "save_every_steps")


def check_different(name: str, values: Sequence[Any], kind: str | None = None) -> None:
    """Raises `ValueError` if two of the `values` of a setting are equal, or one is missing.

    Args:
        name: of the setting.
        values: there may be none only if `kind` is None.
        kind: what they are, in the plural.
    """
    if len(set(values)) < len(values) or (kind and not values):
        given = ",".join(map(str, values))
        asked = f"different {kind}, at least one" if kind else "different values"
        raise ValueError(f"{name}={given} must be {asked}")


def typed(name: str, settings: Any, recipes: Mapping[str, object] | None = None) -> str:
    """What to type for `settings`: all that is not as by default.

    Folders to write to are left out, and other paths are `PATH`.

    Args:
        name: the command's name.
        settings: what `parse` returns.
        recipes: as in `parse`; the one that leaves the least to be typed is taken.
    """
    fields = dataclasses.fields(settings)
    required = {
        f.name: getattr(settings, f.name) for f in fields if f.default is dataclasses.MISSING
    }
    candidates = [_flags(settings, type(settings)(**required))]
    if recipes is not None:
        candidates = [
            [f"--recipe={recipe}"] * (i > 0)
            + _flags(settings, type(settings)(**required, training=training))
            for i, (recipe, training) in enumerate(recipes.items())
        ]
    return " ".join([f"python -m experiments.{name}", *map(shlex.quote, min(candidates, key=len))])


def _flags(settings: Any, default: Any) -> list[str]:
    hints = get_type_hints(type(settings), include_extras=True)
    flags, of_groups = [], []
    for field in dataclasses.fields(settings):
        value, usual = getattr(settings, field.name), getattr(default, field.name)
        flag = field.name.replace("_", "-")
        required = field.default is dataclasses.MISSING
        if dataclasses.is_dataclass(value):
            of_groups += _flags(value, usual)
        elif tyro.conf.Positional in getattr(hints[field.name], "__metadata__", ()):
            flags.append(str(value))
        elif not required and (value == usual or field.name in WRITTEN):
            continue
        elif isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags.append(f"--{flag}={'PATH' if isinstance(value, Path) else _text(value)}")
    return flags + of_groups


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def parse(
    settings_type: type[Settings],
    name: str,
    arguments: Sequence[str] | None = None,
    recipes: Mapping[str, object] | None = None,
    read_config: Callable[[Path], Mapping[str, Any]] | None = None,
) -> Settings:
    """Settings from `arguments` (by default the command line's); sequences are comma-separated.

    Args:
        settings_type: a dataclass; nested ones become groups of flags.
        name: the command's name.
        arguments: the words behind it.
        recipes: values of the field `training`, by the name that the flag `--recipe` takes; other
            flags change single values of the chosen one. The first is the default.
        read_config: reads the file that the flag `--config` names, if there is to be one: settings
            by name, or nested as they are here. Other flags count more.

    Raises:
        SystemExit: after `--help`, or if a flag is unknown or its value refused.
    """
    program = f"python -m experiments.{name}"
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    default, description, file = None, inspect.cleandoc(settings_type.__doc__), None
    if read_config is not None:
        file, arguments = _with_config(program, arguments, settings_type, read_config)
        description += (
            "\n\n--config=FILE takes the settings that no other flag gives from a file: the "
            "config.json of a run, or YAML."
        )
    if recipes is not None:
        chosen, arguments = _take(program, arguments, "recipe", tuple(recipes))
        chosen = chosen or next(iter(recipes))
        default = _with_training(settings_type, recipes[chosen])
        description += (
            f"\n\n--recipe={{{','.join(recipes)}}} chooses all settings of training that no other "
            f"flag gives; here {chosen}."
        )
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)
    framed = io.StringIO()
    try:
        with contextlib.redirect_stderr(framed):
            return tyro.cli(
                settings_type,
                prog=program,
                description=description,
                args=arguments,
                default=default,
                registry=_registry(),
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except BrokenPipeError:  # of --help, say before `| head`
        discard_output()
        sys.exit()
    except SystemExit:
        if said := framed.getvalue():
            said = _without_frame(said)
            if not said.startswith(UNKNOWN):  # which are quoted as they were typed
                said = in_flags(said, settings_type)
            said = _without_help(said) + _hint(said, arguments, settings_type)
            said += f"; --config={file} gives flags too" if file else ""
            print_error(f"{said} ({program} --help explains)")
        raise


def _with_training(settings_type: type[Settings], training: object) -> Settings:
    """The settings that flags change: `training`, all else as by default."""
    required = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(settings_type)
        if field.default is dataclasses.MISSING
    }
    return settings_type(**required, training=training)


def _registry() -> ConstructorRegistry:
    """How words become values."""
    registry = ConstructorRegistry()
    registry.primitive_rule(_comma_separated)
    registry.primitive_rule(_of_one_kind)
    return registry


def in_flags(message: str, settings: Any) -> str:
    """`message` with the flag of each setting that it names with a value: `--batch-size=0`.

    Args:
        message: as a dataclass or a library function words it: `batch_size=0 must be ...`.
        settings: a command's, or their class.
    """

    def flag(found: re.Match) -> str:
        name = found[1].replace("_", "-")
        return {"True": f"--{name}", "False": f"--no-{name}"}.get(found[2], f"--{name}=")

    names = "|".join(name for name, _ in _leaves(settings))
    return re.sub(rf"(?<![\w./-])({names})=((?:True|False)\b)?", flag, message)


def refused_value(error: ValueError, settings: Any) -> str | None:
    """The message of an error that refuses a value of `settings`, with its flag; else None.

    Such a message begins with the setting's name and its value. What a flag takes several of, an
    argument may name in the singular: `rank` what is `ranks` here.
    """
    argument, _, rest = str(error).partition("=")
    for name, value in _leaves(settings):
        if argument not in (name, name.removesuffix("s")):
            continue
        for one in (value, *value) if isinstance(value, tuple) else (value,):
            if re.match(re.escape(str(one)) + r"(?![\w.])", rest):
                return in_flags(f"{name}={_text(one)}{rest[len(str(one)) :]}", settings)
    return None


def _leaves(settings: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of settings, or by default of their class, with those of their groups."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name, None)  # a class has none that is required
        yield from _leaves(value) if dataclasses.is_dataclass(value) else [(field.name, value)]


def _without_frame(framed: str) -> str:
    """The first paragraph of one of tyro's errors, and the flags that it suggests."""
    paragraphs = [[]]
    for line in framed.splitlines()[1:]:  # a title comes first
        line = line.strip(" │")
        if set(line) <= set("─╰╯-"):
            paragraphs.append([])
        else:
            paragraphs[-1].append(line)
    first, *others = [" ".join(paragraph) for paragraph in paragraphs if paragraph]
    first = re.sub(r"^Error parsing (?:[^-]\S*: )?", "", first)  # of a flag, its name stays
    suggested = [
        flag for text in others if "erhaps" in text for flag in re.findall("--[a-z-]+", text)
    ]
    return f"{first}; perhaps {' or '.join(suggested)}" if suggested else first


def _without_help(said: str) -> str:
    """`said`, without the whole help of the one flag or argument that is missing."""
    missing = re.match(r"Missing from [^:]*: (\{[^}]*\}|--[\w-]+) ", said)
    if missing is None:
        return said
    return f"Missing: {missing[1]}" if missing[1][0] == "-" else f"Missing: one of {missing[1]}"


def _hint(said: str, arguments: Sequence[str], settings_type: type) -> str:
    """What was meant, where an error is due to a habit from other programs; empty if unknown."""
    if said.startswith("Missing "):
        return _hint_of_missing(said, arguments, settings_type)
    if not said.startswith(UNKNOWN) or "; perhaps " in said:
        return ""
    first = said.removeprefix(UNKNOWN).split(", ")[0]
    settings = dict(_leaves(settings_type))
    name, equals, _ = first.partition("=")
    if equals and name.replace("-", "_") in settings:
        return f"; perhaps --{first}"
    if first.startswith("--"):
        given = first.removeprefix("--").partition("=")[0].replace("-", "_")
        meant = [f"--{name.replace('_', '-')}" for name in settings if _means(given, name)]
        return f"; perhaps {' or '.join(meant)}" if meant else ""
    # The flag that it stands behind, as in `--flip=False`, `--flip False`, `--seeds 0 1 2`.
    flag, values = "", []
    for argument in arguments:
        if argument.startswith("--"):
            if first in values:
                break
            flag, _, value = argument.partition("=")
            values = [value] if value else []
        else:
            values.append(argument)
    name = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
    if first in values and isinstance(settings.get(name), bool):
        flag = name.replace("_", "-")
        return f"; it is --{flag} or --no-{flag}, without a value"
    if first in values and isinstance(settings.get(name), tuple):
        return f"; several values have commas between them: {flag}={','.join(values)}"
    return ""


def _hint_of_missing(said: str, arguments: Sequence[str], settings_type: type) -> str:
    """What was typed in the place of what is missing, as `--run=RUN` or `--name=rank`."""
    if positional := re.match(r"Missing value for argument '(\w+)'", said):
        return f"; it stands alone, without --{positional[1]}="
    known = {name for name, _ in _leaves(settings_type)}
    for argument in arguments:
        name = argument.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        if name not in known and name != "recipe":
            return f"; {argument} is none of its flags"
    return ""


def _means(given: str, name: str) -> bool:
    """Whether a flag is known by another name: `lr` or `num_epochs`, or `dropout`."""
    words, others = given.split("_"), name.split("_")
    initials = "".join(word[0] for word in others)
    return given == initials != name[0] or set(words) <= set(others) or set(others) <= set(words)


def _with_config(
    program: str,
    arguments: Sequence[str],
    settings_type: type,
    read_config: Callable[[Path], Mapping[str, Any]],
) -> tuple[str | None, list[str]]:
    """The file of `--config`, if there is one, and `arguments` after the flags it stands for.

    Where the arguments choose a recipe, the file's settings of training do not count.
    """
    text, arguments = _take(program, arguments, "config")
    if text is None:
        return None, arguments
    try:
        path = _path(text)
        flags = {}
        for name, flag in _flags_of(read_config(path), settings_type):
            if name in flags:
                raise ValueError(f"{name} is given twice")
            flags[name] = flag
    except (OSError, ValueError) as error:
        told = error.strerror if isinstance(error, OSError) else error
        print_error(f"--config={text} cannot be taken: {told} ({program} --help explains)")
        sys.exit(EXIT_USAGE)
    if any(each.partition("=")[0] == "--recipe" for each in arguments):
        of_training = {"recipe", *(name for name, _ in _leaves(settings_type.training))}
        flags = {name: flag for name, flag in flags.items() if name not in of_training}
    return text, [*flags.values(), *arguments]


def _flags_of(values: Mapping[str, Any], settings_type: type) -> Iterator[tuple[str, str]]:
    """Names and flags of settings by name, which may be nested as they are in their class.

    Raises:
        ValueError: naming a setting that there is not, or one whose value is no flag's.
    """
    groups = {
        field.name: field.default
        for field in dataclasses.fields(settings_type)
        if dataclasses.is_dataclass(field.default)
    }
    known = dict(_leaves(settings_type))
    for key, value in values.items():
        name = str(key).replace("-", "_")
        flag = f"--{name.replace('_', '-')}"
        if name in groups and isinstance(value, Mapping):
            yield from _flags_of(value, type(groups[name]))
        elif name not in known and name != "recipe":
            raise ValueError(f"{key} is no setting")
        elif isinstance(known.get(name), bool):
            if not isinstance(value, bool):
                raise ValueError(f"{key}={value} must be true or false")
            yield name, flag if value else f"--no-{name.replace('_', '-')}"
        elif isinstance(value, Mapping | bool):
            raise ValueError(f"{key}={value} must be a text, a number or an array")
        elif isinstance(value, list) and not all(type(each) in (str, int, float) for each in value):
            raise ValueError(f"{key}={value} must be an array of texts or numbers")
        else:
            yield name, f"{flag}={_text(tuple(value) if isinstance(value, list) else value)}"


def _take(
    program: str, arguments: Sequence[str], name: str, choices: Sequence[str] | None = None
) -> tuple[str | None, list[str]]:
    """The value of a flag, None where it is not given, and the other arguments."""
    parser = argparse.ArgumentParser(
        prog=program, add_help=False, allow_abbrev=False, exit_on_error=False
    )
    parser.add_argument(f"--{name}", choices=choices)
    try:
        namespace, others = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        print_error(f"{error} ({program} --help explains)")
        sys.exit(EXIT_USAGE)
    return getattr(namespace, name), others


def _of_one_kind(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Paths and numbers, each of which may also be None."""
    kinds = [kind for kind in get_args(info.type) or [info.type] if kind is not NoneType]
    if len(kinds) != 1 or kinds[0] not in CONVERTED:
        return None
    (kind,), optional = kinds, info.type not in CONVERTED
    metavar = {Path: "PATH"}.get(kind, kind.__name__.upper())

    def convert(word: str) -> Any:
        return None if optional and word == "None" else CONVERTED[kind](word)

    return _of_one_word(f"{{None}}|{metavar}" if optional else metavar, info.type, convert)


def _path(word: str) -> Path:
    if not word:  # as of a variable that is not set; it would be the current folder
        raise ValueError("the path must not be empty")
    if is_address(word):
        raise ValueError(f"{word} is an address; it must be a file or folder of this machine")
    try:
        return Path(word).expanduser()  # no shell does behind `=`
    except RuntimeError as error:
        raise ValueError(f"whose home {word} begins with is not known") from error


def _integer(word: str) -> int:
    try:
        value = int(word)
    except ValueError as error:
        raise ValueError(f"{word} is no integer") from error
    if abs(value) > LARGEST:
        raise ValueError(f"{word} is beyond {LARGEST:,}")
    return value


def _real(word: str) -> float:
    try:
        value = float(word)
    except ValueError as error:
        raise ValueError(f"{word} is no number") from error
    if math.isnan(value):
        raise ValueError(f"{word} is no number")
    return value


LARGEST = 2**31 - 1  # of a size or a count
CONVERTED = {Path: _path, int: _integer, float: _real}


def _of_one_word(metavar: str, kind: type, convert: Callable) -> PrimitiveConstructorSpec:
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: convert(words[0]),
        is_instance=lambda value: isinstance(value, kind),
        str_from_instance=lambda value: [_text(value)],
    )


def _comma_separated(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    if get_origin(info.type) is not tuple or get_args(info.type)[1:] != (Ellipsis,):
        return None
    element = get_args(info.type)[0]
    choices = get_args(element) if get_origin(element) is Literal else ()
    convert = str if choices else CONVERTED.get(element, element)

    def instance_from_str(word: str) -> tuple[Any, ...]:
        *texts, last = (text.strip() for text in word.split(","))
        texts += [last] if last else []  # a comma may be the last
        if not all(texts):
            raise ValueError(f"{word} has an empty place between commas")
        values = tuple(map(convert, texts))
        for value in values:
            if choices and value not in choices:
                raise ValueError(f"{value!r} is none of {', '.join(choices)}")
        return values

    metavar = ",".join(choices) if choices else f"{element.__name__.upper()},…"
    return _of_one_word(metavar, tuple, instance_from_str)
