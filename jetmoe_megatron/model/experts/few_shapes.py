"""bf16 matmuls of experts on a CPU, in few shapes.

oneDNN compiles a kernel for each new shape. That takes as long as a small expert's matmul, and megabytes of memory. The
number of rows of an expert is new in every step. So each matmul takes whole blocks of rows, and its last block may
contain rows of the next expert. Their results are overwritten by that expert's own, or multiplied by zero.

Letters: N rows, D input width, F output width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_BLOCK = 64


def grouped_linear(x_ND: Tensor, w_EFD: Tensor, count_E: Tensor) -> Tensor:
    """`y = x @ w[e].T` for each expert's rows. Returns [N, F]."""
    return _GroupedLinear.apply(x_ND, w_EFD, count_E.tolist())


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w_EFD: Tensor, counts: list[int]) -> Tensor:
        ctx.save_for_backward(x_ND, w_EFD)
        ctx.counts = counts
        return _product(x_ND, w_EFD.transpose(1, 2), counts)

    @staticmethod
    def backward(ctx: Any, g_NF: Tensor) -> tuple[Tensor, Tensor, None]:
        x_ND, w_EFD = ctx.saved_tensors
        g_EFD = torch.empty_like(w_EFD)
        for g_FD, (start, end, reach) in zip(g_EFD, _spans(ctx.counts), strict=True):
            torch.mm(_rows(g_NF, start, reach).T, _rows(x_ND[:end], start, reach), out=g_FD)
        return _product(g_NF, w_EFD, ctx.counts), g_EFD, None


def _product(x_ND: Tensor, w_EDF: Tensor, counts: list[int]) -> Tensor:
    rows = x_ND.shape[0]
    y_NF = x_ND.new_empty(rows + _BLOCK, w_EDF.shape[2])
    for w_DF, (start, _, reach) in zip(w_EDF, _spans(counts), strict=True):
        torch.mm(_rows(x_ND, start, reach), w_DF, out=y_NF[start:reach])
    return y_NF[:rows]


def _spans(counts: list[int]) -> Iterator[tuple[int, int, int]]:
    """For each expert: its first row, the row after its last row, and the row after its last block."""
    start = 0
    for count in counts:
        yield start, start + count, start + -(-count // _BLOCK) * _BLOCK
        start += count


def _rows(x_ND: Tensor, start: int, end: int) -> Tensor:
    """Rows `start` up to, not including, `end`; zeros where there are no more rows."""
    missing = end - x_ND.shape[0]
    return torch.nn.functional.pad(x_ND[start:], (0, 0, 0, missing)) if missing > 0 else x_ND[start:end]
