"""What a rank's own device does: matmuls, memory, copies from and to the host."""

from __future__ import annotations

from collections.abc import Callable

import torch

from jetmoe_megatron.doctor.timing import best_seconds
from jetmoe_megatron.runtime.device import device, has_gpu

_WIDTH_ON_GPU, _WIDTH_ON_CPU = 8192, 512  # rows and columns of a matmul
_COPIED_ON_GPU, _COPIED_ON_CPU = 2**30, 2**25  # bytes, more than a cache holds
_COPIED_FROM_HOST = 2**28


def own_rates(dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """What to measure, in this order on all ranks: FLOP/s of `matmul`, bytes/s of all others."""
    rates = {"matmul": lambda: _matmul(dtype), "memory": _memory}
    if has_gpu():
        rates |= {"host to GPU": lambda: _copy(to_gpu=True), "GPU to host": lambda: _copy(to_gpu=False)}
    return rates


def unit_of(rate: str) -> str:
    return "FLOP/s" if rate == "matmul" else "B/s"


def _matmul(dtype: torch.dtype) -> float:
    width = _WIDTH_ON_GPU if has_gpu() else _WIDTH_ON_CPU
    # Random numbers: a GPU multiplies zeros with less power, hence with a higher clock.
    a, b = (torch.randn(width, width, device=device(), dtype=dtype) for _ in range(2))
    return 2 * width**3 / best_seconds(lambda: torch.mm(a, b))


def _memory() -> float:
    """Bytes that are read and written."""
    size = _COPIED_ON_GPU if has_gpu() else _COPIED_ON_CPU
    source = torch.ones(size, device=device(), dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / best_seconds(lambda: target.copy_(source))


def _copy(to_gpu: bool) -> float:
    host = torch.ones(_COPIED_FROM_HOST, dtype=torch.uint8, pin_memory=True)
    own = torch.ones(_COPIED_FROM_HOST, dtype=torch.uint8, device=device())
    source, target = (host, own) if to_gpu else (own, host)
    return _COPIED_FROM_HOST / best_seconds(lambda: target.copy_(source, non_blocking=True))
