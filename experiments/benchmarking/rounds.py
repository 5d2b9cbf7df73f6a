"""Interleaved rounds: every contestant is timed once a round, in an order of its own each round."""

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import track

from experiments.benchmarking.cases import Case, Contestant, Task
from experiments.benchmarking.comparison import check_outputs
from experiments.benchmarking.contestants.runner import Prepared
from experiments.benchmarking.workers import WorkerError, WorkerHandle

MOST_STEPS = 1000

# OpenMP's threads spin for some milliseconds after the last parallel region before they sleep.
SETTLE_SECONDS = 0.03


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How a case is timed.

    Attributes:
        rounds: of every run.
        runs: how often the rounds are gone through.
        restarts: whether training begins anew with every run.
        round_seconds: how long each contestant's round should last at least; None times one step.
        untimed: steps before the timed ones of a round.
    """

    rounds: int
    runs: int = 1
    restarts: bool = False
    round_seconds: float | None = None
    untimed: int = 1


@dataclasses.dataclass(frozen=True)
class Timing:
    """What one contestant took.

    Attributes:
        contestant: which.
        seconds: a step, by round; the rounds of all runs, one run after the other.
        steps_per_round: over which each of them is a mean.
        compile_seconds: None where nothing is compiled.
        peak_memory: bytes, after compilation where that can be told apart.
        tolerance_needed: the largest part of a tolerance that its outputs needed.
    """

    contestant: Contestant
    seconds: tuple[float, ...]
    steps_per_round: int
    compile_seconds: float | None
    peak_memory: int
    tolerance_needed: float


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """The contestants of a case that ran, and why the others did not."""

    case: Case
    timings: tuple[Timing, ...]
    failures: dict[Contestant, str]


def run_case(tasks: Sequence[Task], schedule: Schedule, console: Console) -> CaseResult:
    """Prepares, compares and times the contestants of one case, which `tasks` share.

    Raises:
        MismatchError: if two contestants do not compute the same.
    """
    case = tasks[0].case
    with contextlib.ExitStack() as stack:
        field = _Field(console, stack)
        prepared = field.prepare(tasks)
        needed = check_outputs(case, {c: p.outputs for c, p in prepared.items()})
        steps = {c: steps_per_round(p.step_seconds, schedule) for c, p in prepared.items()}
        compile_seconds = {c: p.compile_seconds for c, p in prepared.items()}
        # Outputs may be large.
        del prepared
        seconds = field.time(steps, schedule, case)
        memory = field.each(lambda worker, _: worker.ask("peak_memory"), "peak memory")
    timings = tuple(
        Timing(c, tuple(seconds[c]), steps[c], compile_seconds[c], memory[c], needed[c])
        for c in memory
    )
    return CaseResult(case, timings, field.failures)


def steps_per_round(step_seconds: float, schedule: Schedule) -> int:
    """How many steps fill a round."""
    if schedule.round_seconds is None:
        return 1
    return min(MOST_STEPS, max(1, round(schedule.round_seconds / max(step_seconds, 1e-9))))


class _Field:
    """The workers of a case that still run; one that fails is closed and its reason kept."""

    def __init__(self, console: Console, stack: contextlib.ExitStack):
        self.console, self.stack = console, stack
        self.workers: dict[Contestant, WorkerHandle] = {}
        self.failures: dict[Contestant, str] = {}

    def prepare(self, tasks: Sequence[Task]) -> dict[Contestant, Prepared]:
        """Starts all workers, then makes one after the other ready."""
        by_contestant = {task.contestant: task for task in tasks}
        contestants = "1 contestant" if len(tasks) == 1 else f"{len(tasks)} contestants"
        self.console.print(f"{tasks[0].case.title}: {contestants}")
        for contestant, task in by_contestant.items():
            worker = WorkerHandle(contestant.framework, task.machine.threads)
            self.workers[contestant] = self.stack.enter_context(worker)
        # Frameworks are imported side by side, and nothing is timed before all are.
        self.each(lambda worker, _: worker.ready(), "starting")
        return self.each(lambda worker, c: worker.ask("prepare", by_contestant[c]), "compiling")

    def time(
        self, steps: dict[Contestant, int], schedule: Schedule, case: Case
    ) -> dict[Contestant, list[float]]:
        """Seconds a step of every round, of those contestants that ran to the end."""
        seconds = {contestant: [] for contestant in self.workers}
        shuffler = random.Random(case.seed)
        for index in self.tracked(range(schedule.runs * schedule.rounds), "rounds"):
            if schedule.restarts and index % schedule.rounds == 0:
                self.each(lambda worker, _: worker.ask("restart"))
            order = list(self.workers)
            shuffler.shuffle(order)
            for contestant in order:
                took = self.attempt(
                    contestant, lambda w, c: w.ask("round", steps[c], schedule.untimed)
                )
                seconds[contestant].append(took)
                time.sleep(SETTLE_SECONDS)
        return seconds

    def each(
        self, function: Callable[[WorkerHandle, Contestant], object], description: str = ""
    ) -> dict:
        """What `function` returns for each contestant that it succeeds for."""
        results = {}
        for contestant in self.tracked(list(self.workers), description):
            results[contestant] = self.attempt(contestant, function)
        return {c: result for c, result in results.items() if c in self.workers}

    def attempt(
        self, contestant: Contestant, function: Callable[[WorkerHandle, Contestant], object]
    ) -> object:
        """What `function` returns, or None if the contestant is out of the field from now on."""
        try:
            return function(self.workers[contestant], contestant)
        except WorkerError as error:
            self.failures[contestant] = str(error)
            self.workers.pop(contestant).close()
            self.console.print(f"{contestant.name} could not run: {error}")
            return None

    def tracked(self, sequence: Sequence, description: str) -> Sequence:
        """`sequence`, with a bar on a terminal, and a line elsewhere."""
        hidden = not description or not self.console.is_terminal
        if hidden and description:
            self.console.print(f"  {description}: {len(sequence)}")
        return track(
            sequence,
            description=description,
            console=self.console,
            transient=True,
            disable=hidden,
        )
