"""SwiGLU (Shazeer, arXiv 2002.05202, equation 6) that keeps only its input for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jetmoe_megatron.model.fusion import fused


def swiglu(x_N2F: Tensor) -> Tensor:
    """silu of the first half of each row, times the second: [N, 2 * F] -> [N, F]."""
    return _SwiGLU.apply(x_N2F)


@fused
def _forward(x_N2F: Tensor) -> Tensor:
    activated, linear = x_N2F.chunk(2, dim=-1)
    return torch.nn.functional.silu(activated) * linear


@fused
def _gradient(g_NF: Tensor, x_N2F: Tensor) -> Tensor:
    activated, linear = x_N2F.chunk(2, dim=-1)
    g_activated = torch.ops.aten.silu_backward(g_NF * linear, activated)
    return torch.cat([g_activated, g_NF * torch.nn.functional.silu(activated)], dim=-1)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N2F: Tensor) -> Tensor:
        ctx.save_for_backward(x_N2F)
        return _forward(x_N2F)

    @staticmethod
    def backward(ctx: Any, g_NF: Tensor) -> Tensor:
        (x_N2F,) = ctx.saved_tensors
        return _gradient(g_NF, x_N2F)
