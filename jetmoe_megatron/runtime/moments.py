"""Moments of this rank's computing. How far apart two of them are is asked later, so that nothing waits for a GPU."""

from __future__ import annotations

import time
from typing import Any

import torch

from jetmoe_megatron.runtime.device import has_gpu

Moment = Any  # an event on a GPU, else seconds


def moment() -> Moment:
    """Now; on a GPU, when it comes to this point of its work."""
    if not has_gpu():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(began: Moment, ended: Moment) -> float:
    """On a GPU, both must be in the past."""
    return began.elapsed_time(ended) / 1e3 if has_gpu() else ended - began
