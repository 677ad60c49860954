"""What the C library keeps of the memory that tensors on a CPU free."""

from __future__ import annotations

import ctypes
from functools import cache

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


@cache
def keep_freed_memory() -> bool:
    """Let the C library keep what tensors on a CPU have freed, for the next ones: once a process, where it can.

    glibc hands large blocks back to the kernel, which then fills the next with zeros, page by page: beside that, an
    elementwise kernel takes a fraction of the time. Kept are up to 2 GB, of blocks below 32 MB. Returns whether it can.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)
    # 32 MB is the most that every glibc takes.
    return bool(mallopt(M_MMAP_THRESHOLD, 2**25) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
