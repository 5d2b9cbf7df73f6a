"""Whether memory that was freed is kept, seen from outside: by the pages that are mapped anew."""

import platform
import subprocess
import sys

import pytest

PAGE_FAULTS = """
import resource, sys
from experiments.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):
    b"x" * 2**25
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    b"x" * 2**25
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(policy):
    done = subprocess.run(
        [sys.executable, "-c", PAGE_FAULTS, policy], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


@pytest.mark.parametrize("glibc", [True] if platform.libc_ver()[0] == "glibc" else [])
def test_large_arrays_are_mapped_once(glibc):
    kept, handed_back = page_faults("kept"), page_faults("handed back")
    assert handed_back >= 20
    assert kept < handed_back / 10
