"""How the process asks the operating system for memory."""

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
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        # Without mappings of their own, large arrays come from the heap, and from one heap only.
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER)
