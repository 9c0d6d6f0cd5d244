"""The time, in the format of the logs, and when this process began."""

from __future__ import annotations

import os
import time
from datetime import datetime, timezone
from pathlib import Path

_EPOCH = time.time() - time.monotonic()


def utc_now() -> str:
    """`2026-11-28T22:17:05Z`."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def steady_time() -> float:
    """Seconds since 1970. Unlike the machine's clock, it is not set while the process runs."""
    return _EPOCH + time.monotonic()


def process_began() -> float:
    """When the kernel started this process, in seconds since 1970; psutil rounds it to a second."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])  # since boot: proc_pid_stat(5)
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")
