"""Memory that one batch frees is kept for the next.

By default glibc gives the tensors of a batch back to the system, and the next batch takes them
anew, page by page: up to half of the CPU time of a network. On other systems nothing changes.
"""

import ctypes

__all__ = ["ENVIRONMENT", "keep_freed_memory"]

_KEPT = 1 << 30

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",  # Ray calls an actor in a thread, and only the main arena grows freely
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT),
}
"""For processes that have not started yet."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def keep_freed_memory() -> None:
    """The same for this process, and for what its main thread allocates."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
        mallopt(_M_MMAP_MAX, 0)
