"""What a benchmark runs on: device, cores, versions, and what else keeps them busy."""

import importlib.metadata
import os
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from chansel_jax.ops import native

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch")

# Environment variables that change how fast the libraries compute.
VARIABLES = (native.LIMIT, "XLA_FLAGS", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")

# Of the cores, beyond which a machine is called busy.
BUSY_LIMIT = 0.1


def usable_cores() -> list[int]:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def versions() -> dict[str, str]:
    """Of Python and of what is installed of `PACKAGES`, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def with_variables(command: str) -> str:
    """`command` behind those of `VARIABLES` that are set, as a shell takes them."""
    given = [f"{name}={shlex.quote(os.environ[name])}" for name in VARIABLES if name in os.environ]
    return " ".join([*given, command])


def cpu_name() -> str:
    """As its maker calls it."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def busy_share(cores: Sequence[int], seconds: float = 0.5) -> float | None:
    """The share of `cores` that is in use while this process sleeps; None if it cannot be told."""
    before = _ticks(cores)
    time.sleep(seconds)
    after = _ticks(cores)
    if before is None or after is None or after[1] == before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def _ticks(cores: Sequence[int]) -> tuple[int, int] | None:
    """Busy and all clock ticks of `cores` so far."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    names, busy, total = {f"cpu{core}" for core in cores}, 0, 0
    for line in path.read_text().splitlines():
        name, *ticks = line.split()
        if name in names:
            # user, nice, system, idle, iowait, irq, softirq, steal; guests are within user.
            values = [int(tick) for tick in ticks[:8]]
            total += sum(values)
            busy += sum(values) - values[3] - values[4]
    return busy, total


def device_name() -> str:
    """What JAX computes on, as its maker calls it."""
    device = jax.devices()[0]
    return cpu_name() if device.platform == "cpu" else device.device_kind
