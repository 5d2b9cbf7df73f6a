"""JSON read as a type: what is taken, and what the message says of what is not."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

import pytest

from experiments.training.typed_json import from_json


@dataclasses.dataclass(frozen=True)
class Point:
    x: int
    y: float = 0.5

    def __post_init__(self):
        if self.x < 0:
            raise ValueError(f"x={self.x} must not be negative")


class Row(TypedDict):
    point: Point
    colour: NotRequired[str | None]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (int, "3", 3),
        (float, "3", 3),
        (float, "3.5", 3.5),
        (bool, "true", True),
        (str, '"a"', "a"),
        (Path, '"a/b"', Path("a/b")),
        (Path | None, "null", None),
        (int | Literal["best", "last"], '"last"', "last"),
        (int | Literal["best", "last"], "7", 7),
        (tuple[int, ...], "[1, 2, 3]", (1, 2, 3)),
        (tuple[int, ...], "[]", ()),
        (tuple[int, str], '[1, "a"]', (1, "a")),
        (Sequence[Sequence[int]], "[[1], []]", [[1], []]),
        (Mapping[str, Any], '{"a": [null]}', {"a": [None]}),
        (Point, '{"x": 1}', Point(1, 0.5)),
        (Row, '{"point": {"x": 1, "y": 2}, "more": []}', {"point": Point(1, 2), "more": []}),
    ],
)
def test_taken(kind, text, expected):
    found = from_json(kind, json.loads(text))
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (int, "true", "a=True must be an integer"),
        (int, "3.0", "a=3.0 must be an integer"),
        (float, "NaN", "a=nan must be a finite number"),
        (float, "1e999", "a=inf must be a finite number"),
        (float, f"1{'0' * 400}", "must be a finite number"),
        (float, '"1"', "a='1' must be a finite number"),
        (bool, "1", "a=1 must be true or false"),
        (str, "null", "a=None must be a text"),
        (Path | None, "1", "a=1 must be a path"),
        (Literal["best", "last"], "[]", "a=[] must be one of best, last"),
        (tuple[int, ...], '"ab"', "a='ab' must be an array"),
        (tuple[int, int], "[1]", "a=[1] must be an array of 2"),
        (tuple[int, ...], '[1, "b"]', "a[1]='b' must be an integer"),
        (Mapping[str, int], '{"b": "c"}', "a.b='c' must be an integer"),
        (Mapping[str, int], "[]", "a=[] must be an object"),
        (Point, "{}", "a lacks x"),
        (Point, '{"x": 1, "z": 2, "w": 3}', "a has no w, z"),
        (Point, '{"x": -1}', "x=-1 must not be negative"),
        (Row, "{}", "a lacks point"),
        (Sequence[Row], '[{"point": {"x": ""}}]', "a[0].point.x='' must be an integer"),
    ],
)
def test_refused(kind, text, message):
    with pytest.raises(ValueError, match=f"{re.escape(message)}$") as error:
        from_json(kind, json.loads(text), "a")
    assert len(str(error.value)) < 120
