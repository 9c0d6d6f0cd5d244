"""torch's own grouped matmul: a loop on the CPU, one CUTLASS kernel on Hopper."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm


def width_multiple(precision: str) -> int:
    """grouped_mm wants strides of 16 bytes (torch/aten/src/ATen/native/GroupedMMUtils.h)."""
    return 8 if precision == "bf16" else 4


def grouped_linear(x_ND: Tensor, w_EFD: Tensor, count_E: Tensor) -> Tensor:
    """`y = x @ w[e].T` for each expert's rows. Returns [N, F]."""
    if x_ND.shape[0] == 0:  # grouped_mm refuses zero rows; a matmul keeps the graph whole
        return x_ND @ w_EFD[0].T + 0 * w_EFD.sum()
    end_E = count_E.to(x_ND.device).cumsum(0, dtype=torch.int32)
    return grouped_mm(x_ND, w_EFD.transpose(1, 2), offs=end_E)
