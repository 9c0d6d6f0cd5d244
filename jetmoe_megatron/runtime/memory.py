"""Freed memory stays with the process: a step on a CPU then does not ask the kernel for the same pages again."""

from __future__ import annotations

import ctypes

# glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_AT_ONCE = 2**26  # bytes


def keep_freed_memory() -> None:
    """glibc gives a tensor's pages back when it is freed, and a page that is new takes longer than what is computed on
    it. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)  # large blocks too come from the heap
        mallopt(_TRIM_THRESHOLD, -1)  # which never shrinks
        mallopt(_TOP_PAD, _AT_ONCE)
