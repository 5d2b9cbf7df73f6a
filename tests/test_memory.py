"""Whether memory that was freed is kept, seen from outside: by the pages that are mapped anew."""

import platform
import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource, sys
from chansel_jax.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):
    b"x" * 2**25
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    b"x" * 2**25
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# Of 300 MB that are freed below an array that is not.
RESIDENT = """
import re
from pathlib import Path
from chansel_jax.memory import hand_back_memory, keep_freed_memory
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024
keep_freed_memory()
arrays = [b"x" * 10**8 for _ in range(4)]
full = resident()
del arrays[:3]
freed = resident()
hand_back_memory()
print(full, freed, resident())
"""
GLIBC = [True] if platform.libc_ver()[0] == "glibc" else []  # nothing to test elsewhere


def run(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], check=True, capture_output=True, text=True
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.parametrize("glibc", GLIBC)
def test_large_arrays_are_mapped_once(glibc):
    (kept,), (handed_back,) = run(PAGE_FAULTS, "kept"), run(PAGE_FAULTS, "handed back")
    assert handed_back >= 20
    assert kept < handed_back / 10


@pytest.mark.parametrize("glibc", GLIBC)
def test_what_is_kept_can_be_handed_back(glibc):
    full, freed, handed_back = run(RESIDENT)
    assert freed > full - 10
    assert handed_back < full - 250
