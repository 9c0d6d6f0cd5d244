"""Memory of the host: what is there, and how a step on a CPU keeps it."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
from pathlib import Path

# glibc's malloc.h
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_AT_ONCE = 2**26  # bytes


def keep_freed_memory() -> None:
    """Freed memory stays with the process. By default, glibc returns a tensor's pages when it is freed, and getting a
    new page takes longer than computing on it. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)  # large blocks too come from the heap
        mallopt(_TRIM_THRESHOLD, -1)  # which never shrinks
        mallopt(_TOP_PAD, _AT_ONCE)


def available_memory() -> int:
    """Bytes that new processes of this machine can get. Limits of a container or a job are not in it."""
    found = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found, "Linux has it since 3.14"
    return int(found[1]) * 1024


def grown_memory() -> int:
    """Bytes that this process and the processes it started hold, without files that they have mapped.

    Pages that a child has in common with its parent are counted for both.
    """
    pids = ["self", *(str(child.pid) for child in multiprocessing.active_children())]
    return sum(map(_private, pids))


def _private(pid: str) -> int:
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")  # resident, without what is shared


def own_memory() -> int:
    """Bytes that this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
