"""A process that runs one contestant, and answers its parent over a pipe.

Started as `python -m experiments.benchmarking.contestants.worker FD`. A request is a name and
arguments, the answer a pair: whether it succeeded, and a value or the reason.
"""

import importlib
import sys
from multiprocessing.connection import Connection

from chansel_jax.memory import keep_freed_memory

SIDES = {
    "JAX": "experiments.benchmarking.contestants.jax_side",
    "PyTorch": "experiments.benchmarking.contestants.torch_side",
}


def serve(connection: Connection) -> None:
    """Answers requests until the parent closes its end.

    `load` imports a framework, the slow part of starting, and `prepare` makes the contestant of a
    task ready; all others are methods of that, or before it functions of the framework's side.
    """
    side = runner = None
    while True:
        try:
            request, arguments = connection.recv()
        except EOFError:
            return
        answer = None
        try:
            if request == "load":
                side = importlib.import_module(SIDES[arguments[0]])
            elif request == "prepare":
                runner = side.make_runner(*arguments)
                answer = runner.prepare()
            else:
                answer = getattr(runner or side, request)(*arguments)
        except Exception as error:
            connection.send((False, one_line(error)))
        else:
            connection.send((True, answer))


def one_line(error: BaseException) -> str:
    """The error's kind and the first line it says."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


if __name__ == "__main__":
    # As every command does; PyTorch's steps are the faster for it as well.
    keep_freed_memory()
    serve(Connection(int(sys.argv[1])))
