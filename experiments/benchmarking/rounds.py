"""Interleaved rounds: every contestant is timed once a round, in an order of its own each round."""

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Sequence

from rich.console import Console

from experiments.benchmarking.cases import Case, Contestant, Task
from experiments.benchmarking.comparison import check_outputs
from experiments.benchmarking.workers import WorkerError, WorkerHandle
from experiments.cli.console import tracked

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
        took: as in `Prepared`.
    """

    contestant: Contestant
    seconds: tuple[float, ...]
    steps_per_round: int
    compile_seconds: float | None
    peak_memory: int
    tolerance_needed: float
    took: str | None = None


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
    case, by_contestant = tasks[0].case, {task.contestant: task for task in tasks}
    console.print(f"{case.title}: {len(tasks)} contestant{'s' * (len(tasks) > 1)}")
    field = _Field(console)
    try:
        for contestant, task in by_contestant.items():
            worker = WorkerHandle(contestant.framework, task.machine.threads)
            field.workers[contestant] = worker
        # Frameworks are imported side by side, and nothing is timed before all are.
        field.each("starting", lambda worker, _: worker.hear())
        prepared = field.each(
            "compiling", lambda worker, c: worker.ask("prepare", by_contestant[c])
        )
        needed = check_outputs(case, {c: p.outputs for c, p in prepared.items()})
        steps = {c: steps_per_round(p.step_seconds, schedule) for c, p in prepared.items()}
        compile_seconds = {c: p.compile_seconds for c, p in prepared.items()}
        took = {c: p.took for c, p in prepared.items()}
        # Outputs may be large.
        del prepared
        seconds = field.time(steps, schedule, case.seed)
        memory = field.each("peak memory", lambda worker, _: worker.ask("peak_memory"))
    finally:
        for worker in field.workers.values():
            worker.close()
    timings = tuple(
        Timing(c, tuple(seconds[c]), steps[c], compile_seconds[c], memory[c], needed[c], took[c])
        for c in memory
    )
    return CaseResult(case, timings, field.failures)


def steps_per_round(step_seconds: float, schedule: Schedule) -> int:
    """How many steps fill a round."""
    if schedule.round_seconds is None:
        return 1
    return min(MOST_STEPS, max(1, round(schedule.round_seconds / max(step_seconds, 1e-9))))


@dataclasses.dataclass
class _Field:
    """The workers of a case that still run; one that fails is closed and its reason kept."""

    console: Console
    workers: dict[Contestant, WorkerHandle] = dataclasses.field(default_factory=dict)
    failures: dict[Contestant, str] = dataclasses.field(default_factory=dict)

    def time(
        self, steps: dict[Contestant, int], schedule: Schedule, seed: int
    ) -> dict[Contestant, list[float]]:
        """Seconds a step of every round, of those contestants that ran to the end."""
        seconds = {contestant: [] for contestant in self.workers}
        shuffler = random.Random(seed)
        for index in self.tracked("rounds", range(schedule.runs * schedule.rounds)):
            order = list(self.workers)
            if schedule.restarts and index % schedule.rounds == 0:
                for contestant in order:
                    self.attempt(contestant, lambda worker, _: worker.ask("restart"))
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
        self, description: str, function: Callable[[WorkerHandle, Contestant], object]
    ) -> dict:
        """What `function` returns for each contestant that it succeeds for."""
        contestants = self.tracked(description, list(self.workers))
        results = {contestant: self.attempt(contestant, function) for contestant in contestants}
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

    def tracked(self, description: str, sequence: Sequence) -> Iterable:
        """`sequence`, with a bar on a terminal, and a line elsewhere."""
        if not self.console.is_terminal:
            self.console.print(f"  {description}: {len(sequence)}")
        return tracked(sequence, description, self.console)
