"""The shortest of several repeats: what the machine can do when nothing else disturbs it for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from jetmoe_megatron.runtime.device import has_gpu

_REPEATS = 8
_SECONDS_OF_REPEAT = 0.2  # on a GPU, where a clock that falls under load must have the time to fall
_SECONDS = 0.5  # of all repeats at least, so that other work on a CPU is over for a moment


def best_seconds(work: Callable[[], object]) -> float:
    """Seconds of one call. The first call is not counted: it may compile, allocate or connect."""
    work()
    calls = max(1, round(_SECONDS_OF_REPEAT / _seconds(work, 1))) if has_gpu() else 1
    repeats: list[float] = []
    end = time.perf_counter() + _SECONDS
    while len(repeats) < _REPEATS or time.perf_counter() < end:
        repeats.append(_seconds(work, calls))
    return min(repeats)


def best_seconds_together(work: Callable[[], object]) -> float:
    """As `best_seconds`, for work that ranks do together: all make the same number of calls."""
    work()
    calls = 4 if has_gpu() else 1
    return min(_seconds(work, calls) for _ in range(_REPEATS))


def _seconds(work: Callable[[], object], calls: int) -> float:
    _wait_for_gpu()
    began = time.perf_counter()
    for _ in range(calls):
        work()
    _wait_for_gpu()
    return (time.perf_counter() - began) / calls


def _wait_for_gpu() -> None:
    if has_gpu():
        torch.cuda.synchronize()
