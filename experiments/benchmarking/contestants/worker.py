"""A process that runs one contestant, and answers its parent over a pipe.

Started as `python -m experiments.benchmarking.worker FD`. A request is a name and arguments, the
answer a pair: `("answer", value)` or `("failure", reason)`.
"""

import importlib
import sys
from multiprocessing.connection import Connection
from typing import Any

from experiments.benchmarking.cases import Framework, Task
from experiments.benchmarking.contestants.runner import available_memory, resident_peak
from experiments.cli.memory import hand_back_memory, keep_freed_memory

SIDES = {
    "JAX": "experiments.benchmarking.contestants.jax_side",
    "PyTorch": "experiments.benchmarking.contestants.torch_side",
}


class Worker:
    """What the parent may ask for, one method a request."""

    def load(self, framework: Framework) -> None:
        """Imports the framework, the slow part of starting."""
        self.side = importlib.import_module(SIDES[framework])

    def describe(self) -> dict[str, str]:
        """The device."""
        return self.side.describe()

    def measure(self, *arguments: Any) -> Any:
        """The machine's ceilings."""
        return self.side.measure(*arguments)

    def prepare(self, task: Task) -> Any:
        """Builds the contestant of `task` and makes it ready."""
        self.runner = self.side.make_runner(task)
        prepared = self.runner.prepare()
        self.cold = self._make_room()
        return prepared

    def round(self, steps: int, untimed: int) -> float:
        """Seconds a step."""
        if self.cold:
            untimed = max(untimed, self.runner.warm_up_steps)
        seconds = self.runner.round(steps, untimed)
        self.cold = self._make_room()
        return seconds

    def restart(self) -> None:
        """Begins training anew."""
        self.runner.restart()

    def peak_memory(self) -> int:
        """Bytes."""
        return self.runner.peak_memory()

    def _make_room(self) -> bool:
        """Hands free memory back while this worker waits, if the next one might not find enough.

        Only then: a step takes longer for some steps after its memory was given away. Returns
        whether it was.
        """
        available = available_memory()
        short = available is not None and available < 2 * resident_peak()
        if short:
            hand_back_memory()
        return short


def serve(connection: Connection) -> None:
    """Answers requests until the parent closes its end."""
    worker = Worker()
    while True:
        try:
            request, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = ("answer", getattr(worker, request)(*arguments))
        except Exception as error:
            answer = ("failure", one_line(error))
        connection.send(answer)


def one_line(error: BaseException) -> str:
    """The error's kind and the first line it says."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


if __name__ == "__main__":
    # As every command does; PyTorch's steps are the faster for it as well.
    keep_freed_memory()
    serve(Connection(int(sys.argv[1])))
