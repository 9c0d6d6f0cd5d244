"""The limits of this host."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import psutil

from data_tools.units import shown
from jetmoe_megatron.doctor.problems import Problem

_ADAPTERS = Path("/sys/class/infiniband")
_SHARED_MEMORY = Path("/dev/shm")


def host_limits() -> tuple[list[tuple[str, str]], list[Problem]]:
    memory = psutil.virtual_memory()
    adapters = sorted(adapter.name for adapter in _ADAPTERS.iterdir()) if _ADAPTERS.is_dir() else []
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    problems = []
    if adapters and locked != resource.RLIM_INFINITY:
        why = "NCCL locks memory for InfiniBand"
        mend = "ulimit -l unlimited, before the launcher starts (on SLURM: PropagateResourceLimits, or LimitMEMLOCK)"
        problems.append(Problem("unsure", f"locked memory (ulimit -l) of {_limit(locked)}", why, mend))
    return [
        ("memory", f"{shown(memory.available, 'B')} of {shown(memory.total, 'B')} available"),
        ("/dev/shm", room(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else "none"),
        ("open files", f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]:,}"),  # never unlimited
        ("locked memory", _limit(locked)),
        ("InfiniBand", ", ".join(adapters) or "none"),
    ], problems


def room(folder: Path) -> str:
    """Of its file system."""
    disk = os.statvfs(folder)
    free, size = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    return f"{shown(free, 'B')} of {shown(size, 'B')} free"


def _limit(size: int) -> str:
    return "unlimited" if size == resource.RLIM_INFINITY else shown(size, "B")
