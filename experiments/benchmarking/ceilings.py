"""What the machine can do at most: the fastest copy and matrix product that can be measured.

The measured rates are lower bounds of the machine's own, so a contestant may come close to 100 %
or, rarely, above it.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much work the ceilings are measured with.

    Attributes:
        copy_bytes: of the array that is copied; more than the caches hold.
        product_size: rows and columns of the square matrices that are multiplied.
        seconds: for how long each is tried.
    """

    copy_bytes: int = 2**29
    product_size: int = 2048
    seconds: float = 1.0


CPU_EFFORT = Effort()
GPU_EFFORT = Effort(copy_bytes=2**31, product_size=8192)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured rates.

    Attributes:
        bytes_per_second: read and written, added up.
        multiply_adds_per_second: of matrix products, by dtype.
    """

    bytes_per_second: float
    multiply_adds_per_second: Mapping[str, float]


def best(measured: Sequence[Ceilings]) -> Ceilings:
    """The highest of each rate."""
    dtypes = measured[0].multiply_adds_per_second
    return Ceilings(
        max(each.bytes_per_second for each in measured),
        {d: max(each.multiply_adds_per_second[d] for each in measured) for d in dtypes},
    )


def best_rate(amount: float, function: Callable[[], object], seconds: float) -> float:
    """The highest `amount` per second over the calls of `function` that fit into `seconds`.

    The first call is not timed.
    """
    function()
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or fastest == float("inf"):
        start = time.perf_counter()
        function()
        fastest = min(fastest, time.perf_counter() - start)
    return amount / fastest


def numpy_copy_rate(effort: Effort, threads: int) -> float:
    """Bytes read and written a second by one copying thread a core."""
    source = np.ones(effort.copy_bytes // 4, np.float32)
    parts = list(
        zip(np.array_split(source, threads), np.array_split(source.copy(), threads), strict=True)
    )
    with ThreadPoolExecutor(threads) as pool:
        return best_rate(
            2 * source.nbytes,
            lambda: list(pool.map(lambda part: np.copyto(part[1], part[0]), parts)),
            effort.seconds,
        )
