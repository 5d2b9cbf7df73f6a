"""What a contestant is inside its worker: prepared once, then timed round by round."""

import abc
import contextlib
import dataclasses
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from chansel_jax.memory import hand_back_memory

# CUDA graphs are recorded in the second or third step, cuDNN is tuned in the first; on CPUs the
# allocator settles within five.
WARM_UP_STEPS = 5

FIRST_UPDATE = "first update"
GRADIENT = "gradient"

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a contestant reports once it is warm.

    Attributes:
        compile_seconds: in JAX, tracing and compilation; in PyTorch, the first step, in which it
            compiles. None where nothing is compiled.
        step_seconds: one step, roughly.
        outputs: what must be equal between contestants, by name, in PyTorch's layouts but NHWC.
        took: the lowerings that `"auto"` takes in JAX; None of all else.
    """

    compile_seconds: float | None
    step_seconds: float
    outputs: Arrays
    took: str | None = None


def gradients(arrays: Arrays) -> dict[str, np.ndarray]:
    """Gradients, given by what they are of, as outputs."""
    return {f"{GRADIENT} of {name}": array for name, array in arrays.items()}


def first_update(before: Arrays, after: Arrays) -> dict[str, np.ndarray]:
    """What the optimiser added to all parameters, as one vector among the outputs."""
    added = [(after[name] - before[name]).ravel() for name in sorted(before)]
    return {FIRST_UPDATE: np.concatenate(added)}


def resident_peak() -> int:
    """The most bytes that this process had in memory."""
    if (told := _told_by("/proc/self/status", "VmHWM")) is not None:
        return told
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def make_room() -> bool:
    """Hands free memory back while this process waits, if the next one might not find enough.

    Only then: a step takes longer for some steps after its memory was given away. Returns whether
    it was.
    """
    available = _told_by("/proc/meminfo", "MemAvailable")
    short = available is not None and available < 2 * resident_peak()
    if short:
        hand_back_memory()
    return short


def _told_by(file: str, name: str) -> int | None:
    """The bytes that a file of the kernel's gives for `name`; None if it does not."""
    path = Path(file)
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


class Runner(abc.ABC):
    """One contestant, running; `restart` begins training anew where epochs are timed."""

    warm_up_steps = WARM_UP_STEPS
    took: str | None = None

    @abc.abstractmethod
    def warm_up(self) -> tuple[float | None, Arrays]:
        """Compiles; returns the seconds that took and the outputs to compare."""

    @abc.abstractmethod
    def run(self, steps: int) -> None:
        """Runs `steps` steps and waits until the device has finished."""

    def prepare(self) -> Prepared:
        """Makes all ready, so that nothing but steps is left to time."""
        compile_seconds, outputs = self.warm_up()
        self.reset_peak_memory()
        self.run(self.warm_up_steps)
        prepared = Prepared(compile_seconds, self._timed(1), outputs, self.took)
        self.cold = make_room()
        return prepared

    def round(self, steps: int, untimed: int) -> float:
        """Seconds a step over `steps` steps, after at least `untimed` that warm the caches."""
        self.run(max(untimed, self.warm_up_steps) if self.cold else untimed)
        seconds = self._timed(steps) / steps
        self.cold = make_room()
        return seconds

    def reset_peak_memory(self) -> None:
        """Forgets what compilation needed; where that cannot be, the peak includes it."""
        hand_back_memory()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def peak_memory(self) -> int:
        """Bytes; on a CPU those of the whole process, on a GPU those of its arrays."""
        return resident_peak()

    def _timed(self, steps: int) -> float:
        start = time.perf_counter()
        self.run(steps)
        return time.perf_counter() - start
