"""The parent's end of a worker: starts it, asks it, and says why it did not answer."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from chansel_jax.errors import OneLineError
from experiments.benchmarking.cases import Framework

# A network may take minutes to compile, an epoch on a CPU as well; this is for what hangs.
PATIENCE_SECONDS = 3600.0
POLL_SECONDS = 0.5


class WorkerError(OneLineError):
    """A worker failed or died."""


class WorkerHandle:
    """A worker process with one framework; the first that it lets `hear` is that this is imported.

    Close it in the end.

    Args:
        framework: what it will import.
        threads: of a CPU.
    """

    def __init__(self, framework: Framework, threads: int):
        # It lives as long as the process, until `close`.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._connection, theirs = multiprocessing.Pipe()
        module, descriptor = "experiments.benchmarking.contestants.worker", theirs.fileno()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(descriptor)],
                pass_fds=[descriptor],
                env=worker_environment(os.environ, framework, threads),
                stdin=subprocess.DEVNULL,
                stdout=self._errors,
                stderr=self._errors,
                # Interruptions are the parent's to handle, and helpers it started end with it.
                start_new_session=True,
            )
        self.pid = self._process.pid
        self.tell("load", framework)

    def ask(self, request: str, *arguments: Any) -> Any:
        """The worker's answer.

        Raises:
            WorkerError: if the worker fails, dies, or does not answer in time.
        """
        self.tell(request, *arguments)
        return self.hear()

    def tell(self, request: str, *arguments: Any) -> None:
        """Sends a request whose answer `hear` will fetch."""
        with contextlib.suppress(OSError):  # it is dead; why, `hear` finds out
            self._connection.send((request, arguments))

    def hear(self) -> Any:
        """The answer to the oldest request that was sent.

        Raises:
            WorkerError: if the worker fails, dies, or does not answer in time.
        """
        for _ in range(int(PATIENCE_SECONDS / POLL_SECONDS)):
            # What its own helpers hold open does not end with it, so a dead worker is looked for.
            ended = self._process.poll() is not None
            with contextlib.suppress(EOFError, OSError):
                if self._connection.poll(0 if ended else POLL_SECONDS):
                    succeeded, value = self._connection.recv()
                    if not succeeded:
                        raise WorkerError(value)
                    return value
                if not ended:
                    continue
            raise WorkerError(self._cause_of_death())
        raise WorkerError(f"no answer in {PATIENCE_SECONDS:.0f} s")

    def close(self) -> None:
        """Ends the process and all that it started; once, for its number may be another's then."""
        self._connection.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._errors.close()

    def _cause_of_death(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"its process died of {how}" + (f": {said}" if said else "")


def worker_environment(
    environment: Mapping[str, str], framework: Framework, threads: int
) -> dict[str, str]:
    """The environment variables of a worker, given the parent's."""
    ours = {
        # One GPU, whatever the machine has: PyTorch uses no more.
        "CUDA_VISIBLE_DEVICES": environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "OMP_NUM_THREADS": str(threads),
    }
    if framework == "JAX":
        # The GPU's memory is shared with the other contestants.
        ours["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        # What is timed lies on the device; what prepares and compares it moves arrays.
        ours["JAX_TRANSFER_GUARD"] = "allow"
    else:
        # Compilation that an earlier benchmark cached would be reported as fast.
        ours["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    return {**environment, **ours}
