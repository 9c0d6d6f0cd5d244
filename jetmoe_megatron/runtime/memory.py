"""Freed memory stays with the process: a step on a CPU then does not ask the kernel for the same pages again."""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_AT_ONCE = 2**26  # bytes


def keep_freed_memory() -> None:
    """By default, glibc returns a tensor's pages when it is freed, and getting a new page takes longer than computing
    on it. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)  # large blocks too come from the heap
        mallopt(_TRIM_THRESHOLD, -1)  # which never shrinks
        mallopt(_TOP_PAD, _AT_ONCE)
