"""What the machine is, asked of workers: the parent itself starts no GPU."""

import contextlib
import dataclasses
from typing import Any

from rich.console import Console

from experiments.benchmarking.cases import Framework, Machine
from experiments.benchmarking.ceilings import CPU_EFFORT, GPU_EFFORT, Ceilings, best
from experiments.benchmarking.plan import make_dtypes, make_machine
from experiments.benchmarking.settings import Settings
from experiments.benchmarking.workers import WorkerError, WorkerHandle
from experiments.reporting import machine as machines

EFFORTS = {"cpu": CPU_EFFORT, "gpu": GPU_EFFORT}


@dataclasses.dataclass(frozen=True)
class Survey:
    """What a benchmark runs on.

    Attributes:
        machine: for the contestants.
        device: its name.
        runtimes: by framework, what drives the device; without PyTorch where there is none.
        busy_before: the share of the cores that something else kept busy.
        ceilings: the machine's.
    """

    machine: Machine
    device: str
    runtimes: dict[Framework, str]
    busy_before: float | None
    ceilings: Ceilings

    @property
    def has_torch(self) -> bool:
        """Whether PyTorch can be timed."""
        return "PyTorch" in self.runtimes

    def figures(self) -> dict[str, Any]:
        """For the results."""
        return {
            **dataclasses.asdict(self.machine),
            "device": self.device,
            "cpu": machines.cpu_name(),
            "runtimes": self.runtimes,
            "busy_before": self.busy_before,
        }


def survey(settings: Settings, console: Console) -> Survey:
    """Looks at the machine and measures its ceilings.

    Raises:
        PlanError: if the machine cannot do what `settings` ask for.
        WorkerError: if JAX cannot run.
    """
    cores = machines.usable_cores()
    busy = machines.busy_share(cores)
    if busy is not None and busy > machines.BUSY_LIMIT:
        console.print(
            f"warning: something else keeps the {len(cores)} cores {busy:.0%} busy; the timings "
            "will be worse for it, PyTorch's most of all"
        )
    with contextlib.closing(WorkerHandle("JAX", len(cores))) as worker:
        worker.hear()
        described = worker.ask("describe")
        machine = make_machine(settings, described["platform"], len(cores))
        runtimes: dict[Framework, str] = {"JAX": described["runtime"]}
        effort, dtypes = EFFORTS[machine.platform], make_dtypes(settings, machine)
        measured = [worker.ask("measure", machine, effort, dtypes)]
    if settings.torch != ():
        try:
            with contextlib.closing(WorkerHandle("PyTorch", len(cores))) as worker:
                worker.hear()
                runtime = worker.ask("describe")["runtime"]
                measured.append(worker.ask("measure", machine, effort, dtypes))
            runtimes["PyTorch"] = runtime
        except WorkerError as error:
            missing = str(error).startswith(("ImportError", "ModuleNotFoundError"))
            hint = '; to install it: pip install -e ".[torch]"' if missing else ""
            console.print(f"PyTorch cannot be timed ({error}), so JAX is timed alone{hint}")
    device = machines.cpu_name() if machine.platform == "cpu" else described["device"]
    return Survey(machine, device, runtimes, busy, best(measured))
