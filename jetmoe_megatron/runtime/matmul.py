"""Which library multiplies matrices on a CPU, and whether it has a kernel for bf16."""

from __future__ import annotations

from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


def choose_matmul() -> None:
    """Choose oneDNN on AMD's CPUs with AVX-512, where MKL, torch's default, runs at half its speed.

    torch's switch for oneDNN is `medium`. It also lets oneDNN round to bf16 on CPUs with a fast bf16 matmul, so a test
    decides. Ranks and resumed runs on the same kind of CPU make the same choice.
    """
    if by_onednn(torch.float32) or not _mkl_is_slow():
        return
    torch.set_float32_matmul_precision("medium")
    if _rounds():
        torch.set_float32_matmul_precision("highest")


def by_onednn(dtype: torch.dtype) -> bool:
    """Whether matmuls of `dtype` on the CPU are oneDNN's, which compiles a kernel for each shape."""
    return dtype == torch.bfloat16 or torch.get_float32_matmul_precision() == "medium"


def bf16_is_slow() -> bool:
    """Whether this CPU has no kernel for bf16 matmuls: then plain loops take many times as long as fp32 matmuls."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _mkl_is_slow() -> bool:
    return (
        torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _CPUINFO.exists()
        and "AuthenticAMD" in _CPUINFO.read_text()
    )


def _rounds() -> bool:
    x = torch.linspace(0.5, 1.0, 256 * 256).view(256, 256)
    exact = x.double() @ x.double()
    return bool(((x @ x - exact).abs() > 1e-5 * exact).any())


def has_amx() -> bool:
    """Whether this CPU has Intel's matrix tiles. torch's own kernels use them if there are any."""
    return torch.cpu._is_amx_tile_supported()
