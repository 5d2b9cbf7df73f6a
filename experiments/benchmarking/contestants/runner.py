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

from experiments.cli.memory import hand_back_memory

# CUDA graphs are recorded in the second or third step, cuDNN is tuned in the first; on CPUs the
# allocator settles within five.
WARM_UP_STEPS = 5

FIRST_UPDATE = "first update"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a contestant reports once it is warm.

    Attributes:
        compile_seconds: in JAX, tracing and compilation; in PyTorch, the first step, in which it
            compiles. None where nothing is compiled.
        step_seconds: one step, roughly.
        outputs: what must be equal between contestants, by name, in PyTorch's layouts but NHWC.
    """

    compile_seconds: float | None
    step_seconds: float
    outputs: Mapping[str, np.ndarray]


def first_update(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> np.ndarray:
    """What the optimiser added to all parameters, as one vector."""
    return np.concatenate([(after[name] - before[name]).ravel() for name in sorted(before)])


def resident_peak() -> int:
    """The most bytes that this process had in memory."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int | None:
    """Bytes that the machine has left; None if it cannot be told."""
    path = Path("/proc/meminfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


class Runner(abc.ABC):
    """One contestant, running."""

    warm_up_steps = WARM_UP_STEPS

    @abc.abstractmethod
    def warm_up(self) -> tuple[float | None, Mapping[str, np.ndarray]]:
        """Compiles; returns the seconds that took and the outputs to compare."""

    @abc.abstractmethod
    def run(self, steps: int) -> None:
        """Runs `steps` steps and waits until the device has finished."""

    def prepare(self) -> Prepared:
        """Makes all ready, so that nothing but steps is left to time."""
        compile_seconds, outputs = self.warm_up()
        self.reset_peak_memory()
        self.run(self.warm_up_steps)
        return Prepared(compile_seconds, self._timed(1), outputs)

    def round(self, steps: int, untimed: int) -> float:
        """Seconds a step over `steps` steps, after `untimed` ones that warm the caches."""
        self.run(untimed)
        return self._timed(steps) / steps

    def restart(self) -> None:
        """Begins training anew.

        Raises:
            NotImplementedError: unless epochs are timed.
        """
        raise NotImplementedError("only epochs begin anew")

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
