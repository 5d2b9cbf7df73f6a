"""A traced program: what each of its operations took, and what part of a network it belongs to."""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

ELSEWHERE = "elsewhere"  # of no layer: augmentation, loss, optimiser


@dataclasses.dataclass(frozen=True)
class Profile:
    """What the steps took.

    Attributes:
        untraced: milliseconds of a step that is not traced.
        milliseconds: of a step, by operation of the compiled program; what runs side by side on
            several threads counts on each.
        bytes_touched: by operation, of its operands and of its results.
        op_names: what each operation was in Python, as XLA keeps it.
        layers: the names of the network's layers.
        took: the lowerings that `"auto"` took, by convolution.
    """

    untraced: float
    milliseconds: Mapping[str, float]
    bytes_touched: Mapping[str, int]
    op_names: Mapping[str, str]
    layers: tuple[str, ...]
    took: Mapping[str, list[str]]


def operations(compiled: str) -> dict[str, str]:
    """The operations of a compiled program's entry, with what each was in Python ("" if nothing).

    What loops and calls contain is left out: it is part of their time.
    """
    instruction = re.compile(r'^\s+(?:ROOT )?%?([\w.-]+) = (?:.*op_name="([^"]*)")?', re.MULTILINE)
    return {name: op_name or "" for name, op_name in instruction.findall(_entry(compiled))}


def bytes_touched(compiled: str) -> dict[str, int]:
    """Of each of `operations`, the bytes of its operands and of its results.

    No operation moves fewer, unless it reads or writes a part of an array only.
    """
    instruction = re.compile(
        r"^\s+(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) [\w-]+\((.*?)\)(?:, |$)", re.MULTILINE
    )
    results, touched = {}, {}
    for name, types, operands in instruction.findall(_entry(compiled)):
        results[name] = sum(itertools.starmap(_bytes_of, re.findall(r"(\w+)\[([\d,]*)\]", types)))
        read = sum(results.get(each, 0) for each in re.findall(r"%?([\w.-]+)", operands))
        touched[name] = results[name] + read
    return touched


def _bytes_of(dtype: str, shape: str) -> int:
    """Of an array as XLA writes its type: `f32` and `128,32,32,16`."""
    bits = 8 if dtype == "pred" else int(re.sub(r"\D.*", "", dtype.lstrip("bfsuc")) or 0)
    return bits // 8 * math.prod(map(int, filter(None, shape.split(","))))


def _entry(compiled: str) -> str:
    return compiled[compiled.index("\nENTRY ") :]


def times(folder: Path, names: Iterable[str], steps: int) -> dict[str, float]:
    """Milliseconds a step of the operations `names` in the one trace that `folder` holds."""
    (path,) = folder.rglob("*.xplane.pb")
    known, total = set(names), collections.Counter()
    trace = jax.profiler.ProfileData.from_file(str(path))
    for plane in trace.planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name in known and not event.name.startswith("end: "):
                    total[name] += event.duration_ns
    return {name: nanoseconds / steps / 1e6 for name, nanoseconds in total.items()}


def kind_of(op_name: str) -> str:
    """The kind of an operation, from its name in Python as XLA keeps it."""
    primitive = op_name.rsplit("/", 1)[-1].lstrip("(")  # as in "(reduce_sum:custom_partitioning)"
    for scope in ("augmentation", "optimizer"):
        if scope in op_name:
            return scope
    if op_name.endswith("/batch_norm/ffi_call"):
        return "BatchNorm, ReLU, sums in C++"
    # Over several devices what is in C++ is called by a `custom_partitioning`.
    if primitive in ("conv_general_dilated", "dot_general", "ffi_call", "custom_partitioning"):
        return "convolutions, matrix products"
    if primitive in ("", "transpose", "copy"):
        return "transposes, copies"
    if primitive.startswith("reduce"):
        return "sums (BatchNorm)"
    return "elementwise (BatchNorm, ReLU, …)"


def layer_of(op_name: str, layers: Iterable[str]) -> str:
    """The layer of an operation, or the part of the network that several layers make up.

    Args:
        op_name: the operation's name in Python as XLA keeps it; `blocks.0.conv1` has
            `"jit(train_step)/transpose(jvp(blocks.0))/conv1/ffi_call"`.
        layers: the names of the network's layers.
    """
    scopes = op_name.split("/")[1:-1]  # the first is the program's, the last the primitive
    names = [re.sub(r"^(?:\w+\()+|\)+$", "", scope) for scope in scopes]
    for end in range(len(names), 0, -1):
        path = ".".join(filter(None, names[:end]))
        if any(_is_within(name, path) for name in layers):
            return path
    return ELSEWHERE


class Spent(NamedTuple):
    """What operations took, and what they touched: `Profile.bytes_touched`."""

    milliseconds: float = 0.0
    bytes_touched: int = 0


def by_kind(profile: Profile) -> list[tuple[str, int, Spent]]:
    """Each kind, how many operations it has and what they took, the most first."""
    kinds = _grouped(profile, kind_of)
    rows = ((kind, len(found), _sum(found)) for kind, found in kinds.items())
    return sorted(rows, key=lambda row: -row[2].milliseconds)


def by_layer(profile: Profile) -> list[tuple[str, Spent, Spent]]:
    """Each layer with what its forward and its backward pass took, in their order.

    What a part does between its layers, as a block's ReLU and sum, has the part's name; the rest
    of the step comes last.
    """

    def part_of(op_name: str) -> tuple[str, bool]:
        return layer_of(op_name, profile.layers), "transpose(" in op_name

    found = {part: _sum(each) for part, each in _grouped(profile, part_of).items()}
    order = {name: number for number, name in enumerate(profile.layers)}
    parts = {name for name, _ in found} - {ELSEWHERE}
    last = {part: max(n for name, n in order.items() if _is_within(name, part)) for part in parts}
    names = [*sorted(parts, key=lambda part: (last[part], part not in order)), ELSEWHERE]
    return [(name, *(found.get((name, back), Spent()) for back in (False, True))) for name in names]


def _is_within(layer: str, part: str) -> bool:
    return f"{layer}.".startswith(f"{part}.")


def _grouped(profile: Profile, key: Callable) -> dict[Any, list[Spent]]:
    groups = collections.defaultdict(list)
    for name, milliseconds in profile.milliseconds.items():
        spent = Spent(milliseconds, profile.bytes_touched.get(name, 0))
        groups[key(profile.op_names[name])].append(spent)
    return groups


def _sum(spent: Iterable[Spent]) -> Spent:
    return Spent(*map(sum, zip(*spent, strict=True)))
