"""How the process asks the operating system for memory."""

import ctypes
import sys

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
NEVER = -1


def keep_freed_memory() -> None:
    """Makes a training on CPUs faster: lets glibc keep what is freed for what comes next.

    XLA:CPU allocates the temporary arrays of a step at
    each step anew. Memory fresh from the operating system is mapped and zeroed page by page when
    it is first touched, while the step waits.

    It may be called at any time, more than once, and holds for all of the process from then on:
    what any part of it frees stays with the process, and all of its threads allocate from one heap.
    `hand_back_memory` gives back what is not in use. Where there is no glibc it does nothing.
    """
    libc = _glibc()
    if libc is not None:
        # Without mappings of their own, large arrays come from the heap, and from one heap only.
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)


def hand_back_memory() -> None:
    """Hands back what is kept but not used; without glibc it does nothing.

    Once an epoch, say: small arrays in the gaps that larger ones left make the heap grow slowly.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
