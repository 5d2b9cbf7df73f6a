"""How the process asks the operating system for memory, and what to do if there is too little."""

import ctypes
import sys

# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
NEVER = -1


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, instead of handing it back and asking for it again.

    XLA:CPU allocates the temporary arrays of a step, some 200 MB for ResNet-14 at batch 128, at
    each step anew. Memory fresh from the operating system is mapped and zeroed page by page when
    it is first touched: that took a third of such a step. Where there is no glibc it does nothing.
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


def shortage(error: Exception) -> str | None:
    """What to tell of an `error` that Python or XLA raised for want of memory; None of others."""
    if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
        return None
    return (
        f"there is too little memory ({error}): a smaller --batch-size takes less; so do, in "
        "training, --accumulate=N, which computes a batch in N parts, and --input=streaming, which "
        "leaves the images on disk"
    )


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
