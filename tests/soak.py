"""Kills a training at random moments, time and again, and checks that nothing is lost.

    python tests/soak.py --kills=50

Each time the same command goes on with the run. It saves after every step, so that most kills come
while a checkpoint is being written. In the end its parameters must be those of a run that was never
killed, bit for bit, and so must the losses of every epoch.
"""

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIGURES = ("train_loss", "train_accuracy", "val_loss", "val_accuracy")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of the killed run.

    Attributes:
        kills: how often it was killed.
        moments: what it had printed last when it was, one a kill.
        same: whether it ended like the run that was never killed.
    """

    kills: int
    moments: tuple[str, ...]
    same: bool


def soak(folder: Path, kills: int, epochs: int, seed: int = 0) -> Outcome:
    """Trains in `folder` twice, once in one go and once killed `kills` times.

    Raises:
        RuntimeError: if the run ends before it has been killed so often, or fails.
    """
    rng = random.Random(seed)
    command = [
        *(sys.executable, "-m", "experiments.train", "--width=4", "--train-images=512"),
        *(f"--epochs={epochs}", "--batch-size=16"),
    ]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    whole, killed = folder / "whole", folder / "killed"
    subprocess.run(
        [*command, f"--workdir={whole}"], env=environment, check=True, stdout=subprocess.DEVNULL
    )
    again = [*command, f"--workdir={killed}", "--save-every-steps=1"]
    moments = [kill_at_random(again, environment, rng) for _ in range(kills)]
    subprocess.run(again, env=environment, check=True, stdout=subprocess.DEVNULL)
    return Outcome(kills, tuple(moments), ending(whole) == ending(killed))


def kill_at_random(command: list[str], environment: dict[str, str], rng: random.Random) -> str:
    """Starts `command` and kills it within a second after its first step may be taken.

    Returns:
        The last line that it has printed.

    Raises:
        RuntimeError: if it ends by itself.
    """
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith("epoch"):
                break
        time.sleep(rng.uniform(0, 1))
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(
            f"it ended ({process.returncode}) before it was killed: {errors or lines[-1]}"
        )
    return [*lines, *rest.splitlines()][-1]


def ending(workdir: Path) -> tuple[str, list[list[float]]]:
    """The digest of a run's last parameters, and the figures of every epoch."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    digest = json.loads((workdir / "summary.json").read_text())["params_sha256"]
    return digest, [[row[name] for name in FIGURES] for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=50, help="of 32 steps each")
    parser.add_argument("--seed", type=int, default=0, help="decides when to kill")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        outcome = soak(Path(folder), arguments.kills, arguments.epochs, arguments.seed)
    for moment in outcome.moments:
        print(moment)
    print(f"killed {outcome.kills} times: {'the same' if outcome.same else 'ANOTHER'} end")
    sys.exit(not outcome.same)


if __name__ == "__main__":
    main()
