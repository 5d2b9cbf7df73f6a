"""A paper model of what data-parallel training pays for its sums over devices.

A step adds up the gradients of all devices, and BatchNorm its sums. An all-reduce of m bytes over n
devices, a power of two, that recursive halving and doubling carry out takes

    t(m, n) = 2 · ceil(log2 n) · latency + 2 · (n − 1) / n · m / bandwidth

(Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH",
2005, without the additions themselves), and nothing of it is hidden behind the computation: the
model's efficiency is a lower bound in that. With T(b) the time of a step of b images on one device:

    weak scaling, b images a device:    T(b) / (T(b) + Σ t)
    strong scaling, b images in all:    T(b) / n / (T(b) / n + Σ t)

the second for a computation that divides by n without loss.
"""

import dataclasses
import math
import re
from collections.abc import Sequence

# Of an element, by XLA's name.
BYTES = {"pred": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8}


@dataclasses.dataclass(frozen=True)
class Link:
    """What connects the devices.

    Attributes:
        bandwidth: bytes a second that a device sends, and receives at the same time.
        latency: seconds until the first byte arrives.
    """

    bandwidth: float
    latency: float

    def all_reduce(self, size: int, devices: int) -> float:
        """Seconds of an all-reduce of `size` bytes."""
        rounds = 2 * math.ceil(math.log2(devices))
        return rounds * self.latency + 2 * (devices - 1) / devices * size / self.bandwidth


def all_reduces(compiled: str) -> list[list[int]]:
    """The bytes of each array of each all-reduce of a compiled program, given as XLA's text.

    Raises:
        KeyError: if one is of a type that is not in `BYTES`.
    """
    instruction = re.compile(r" = (.*?) all-reduce(?:-start)?\(")
    arrays = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
    return [
        [
            BYTES[dtype] * math.prod(int(size) for size in shape.split(",") if size)
            for dtype, shape in arrays.findall(result)
        ]
        for result in instruction.findall(compiled)
    ]


def messages(sizes: Sequence[Sequence[int]], grouped: bool) -> list[int]:
    """The bytes of each message, given those of each array of each all-reduce.

    Args:
        sizes: from `all_reduces`.
        grouped: whether all arrays of an all-reduce are one message, as NCCL sends them; else each
            is one, as between CPUs.
    """
    if grouped:
        return [sum(arrays) for arrays in sizes]
    return [size for arrays in sizes for size in arrays]


def efficiency(seconds: float, sizes: Sequence[int], devices: int, link: Link, weak: bool) -> float:
    """The share of `devices` times the speed of one that the model leaves.

    Args:
        seconds: of a step on one device.
        sizes: bytes of each message of a step.
        devices: how many.
        link: what connects them.
        weak: whether each device has as many images as the one; else it has its share of them.
    """
    computing = seconds if weak else seconds / devices
    return computing / (computing + sum(link.all_reduce(size, devices) for size in sizes))
