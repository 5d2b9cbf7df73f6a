"""JSON read as a type: what a file of a run holds is checked here, and not where it is used."""

import contextlib
import dataclasses
import reprlib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

NUMBERS = {int: "an integer", float: "a finite number"}
OTHERS = {bool: ("true or false", bool), str: ("a text", str), Path: ("a path", str)}


def from_json(kind: Any, value: Any, name: str = "") -> Any:
    """`value`, as JSON holds it, in the type `kind`.

    Args:
        kind: a dataclass, whose fields are as by default where they are missing; a `TypedDict`,
            which may have further keys; `Sequence`, `Mapping` or `tuple` with what is in it; a
            union; a `Literal`; `bool`, `int`, `float`, `str` or `Path`; `Any`, which is not looked
            at.
        value: of `json.loads`.
        name: what it is called in messages.

    Raises:
        ValueError: naming the part of `value` that is of another type, or what a dataclass refuses.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) or typing.is_typeddict(kind):
        return _object(kind, value, name)
    if origin in (types.UnionType, typing.Union):
        return _one_of(arguments, value, name)
    if origin is Literal:
        _hold(value in arguments, value, name, f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is Mapping:
        _hold(isinstance(value, dict), value, name, "an object")
        return {key: from_json(arguments[1], each, f"{name}.{key}") for key, each in value.items()}
    if origin in (tuple, Sequence):
        return _array(origin, arguments, value, name)
    if kind in NUMBERS:
        _hold(_is_number(kind, value), value, name, NUMBERS[kind])
        return value
    told, stored_as = OTHERS[kind]
    _hold(isinstance(value, stored_as), value, name, told)
    return kind(value)


def _hold(condition: bool, value: Any, name: str, what: str) -> None:
    if not condition:
        raise ValueError(f"{name or 'it'}={reprlib.repr(value)} must be {what}")


def _is_number(kind: type, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | kind):
        return False
    return kind is int or abs(value) <= sys.float_info.max


def _one_of(kinds: Sequence[Any], value: Any, name: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not types.NoneType)
    for kind in others:
        with contextlib.suppress(ValueError):
            return from_json(kind, value, name)
    return from_json(last, value, name)


def _array(kind: type, arguments: Sequence[Any], value: Any, name: str) -> Any:
    """A list, or a tuple, whose length its type may give."""
    _hold(isinstance(value, list), value, name, "an array")
    if kind is tuple and arguments[-1] is not Ellipsis:
        _hold(len(value) == len(arguments), value, name, f"an array of {len(arguments)}")
        kinds = arguments
    else:
        kinds = arguments[:1] * len(value)
    found = [
        from_json(each, element, f"{name}[{i}]")
        for i, (each, element) in enumerate(zip(kinds, value, strict=True))
    ]
    return tuple(found) if kind is tuple else found


def _object(kind: type, value: Any, name: str) -> Any:
    """A dataclass, which must know every key, or a typed dict."""
    _hold(isinstance(value, dict), value, name, "an object")
    hints = typing.get_type_hints(kind)
    required, unknown = getattr(kind, "__required_keys__", ()), set()
    if dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        unknown = set(value) - set(hints)
    for names, told in ((unknown, "has no"), (set(required) - set(value), "lacks")):
        if names:
            raise ValueError(f"{name or 'it'} {told} {', '.join(sorted(names))}")
    prefix = f"{name}." if name else ""
    known = {
        key: from_json(hints[key], each, f"{prefix}{key}")
        for key, each in value.items()
        if key in hints
    }
    return kind(**{**value, **known})
