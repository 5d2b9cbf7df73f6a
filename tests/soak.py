"""Kills a training at random moments, time and again, and checks that nothing is lost.

    python tests/soak.py --kills=50

Each time the same command goes on with the run. It saves after every step, so that most kills come
while a checkpoint is being written. In the end its parameters must be those of a run that was never
killed, bit for bit, and so must the losses of every epoch; and some kill must have left a
half-written checkpoint.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from commands import Command, environment

STEPS_PER_EPOCH = 256 // 16
FIGURES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of the killed run.

    Attributes:
        kills: how often it was killed.
        half_written: how many of these left a checkpoint that was being written.
        steps: how far it had come at each kill, by its newest whole checkpoint.
        same: whether it ended like the run that was never killed.
    """

    kills: int
    half_written: int
    steps: tuple[int, ...]
    same: bool


def soak(
    folder: Path,
    kills: int,
    epochs: int,
    seed: int = 0,
) -> Outcome:
    """Trains in `folder` twice, once in one go and once killed `kills` times.

    Args:
        folder: which is there.
        kills: how many.
        epochs: of the training.
        seed: of the moments.

    Raises:
        RuntimeError: if the run ends before it has been killed so often, or fails.
    """
    rng = random.Random(seed)
    command = [
        *("experiments.train", "--blocks=1", "--width=4", "--batch-size=16"),
        *(f"--train-images={16 * STEPS_PER_EPOCH}", f"--epochs={epochs}"),
    ]
    whole, killed = folder / "whole", folder / "killed"
    finish([*command, f"--workdir={whole}"])
    again = [*command, f"--workdir={killed}", "--save-every-steps=1"]
    half_written, steps = 0, []
    for number in range(1, kills + 1):
        kill_at_random(again, killed, rng)
        half_written += any("tmp" in name for name in checkpoint_names(killed))
        steps.append(newest_step(killed))
        print(f"kill {number} of {kills}, after step {steps[-1]}", flush=True)
    finish(again)
    return Outcome(kills, half_written, tuple(steps), ending(whole) == ending(killed))


def finish(command: list[str]) -> None:
    """Waits until it has ended.

    Raises:
        RuntimeError: if it fails.
    """
    with Command(command, environment(devices=1)) as process:
        _, errors = process.communicate(timeout=3600)
    if process.returncode:
        raise RuntimeError(f"it failed ({process.returncode}): {errors}")


def kill_at_random(command: list[str], workdir: Path, rng: random.Random) -> None:
    """Starts `command` and kills it at some moment after it has begun to train.

    In three of four cases that is after it has saved once more, so that the run gets on.

    Raises:
        RuntimeError: if it ends by itself.
    """
    before = newest_step(workdir)
    with Command(command, environment(devices=1)) as process:
        for line in process.stdout:
            if line.startswith("epoch"):
                break
        if rng.random() < 0.75:
            while newest_step(workdir) == before and process.poll() is None:
                time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.5))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"it ended by itself ({process.returncode}): {errors}")


def checkpoint_names(workdir: Path) -> list[str]:
    """Of everything among the run's checkpoints."""
    return [path.name for path in workdir.glob("checkpoints/*")] + [
        path.name for path in workdir.glob("unfinished/*")
    ]


def newest_step(workdir: Path) -> int:
    """The step of the newest whole checkpoint."""
    epochs = [int(p.name) for p in workdir.glob("checkpoints/*") if p.name.isdecimal()]
    steps = [int(p.name) for p in workdir.glob("unfinished/*") if p.name.isdecimal()]
    return max([STEPS_PER_EPOCH * max(epochs, default=0), *steps])


def ending(workdir: Path) -> tuple[str, list[list[float]]]:
    """The digest of a run's last parameters, and the figures of every epoch."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    digest = json.loads((workdir / "summary.json").read_text())["params_sha256"]
    return digest, [[row[name] for name in FIGURES] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=100, help="of 16 steps each")
    parser.add_argument("--seed", type=int, default=0, help="decides when to kill")
    arguments = parser.parse_args()
    # JAX reads these when it is imported, in a process that this one starts.
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(folder) / "compiled"))
        outcome = soak(Path(folder), arguments.kills, arguments.epochs, arguments.seed)
    print(
        f"killed {outcome.kills} times, {outcome.half_written} while a checkpoint was written: "
        f"{'the same' if outcome.same else 'ANOTHER'} end"
    )
    sys.exit(not (outcome.same and outcome.half_written))


if __name__ == "__main__":
    main()
