"""torch's own grouped matmul: a loop on the CPU, one CUTLASS kernel on Hopper."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from jetmoe_megatron.model.experts import few_shapes
from jetmoe_megatron.runtime.matmul import by_onednn


def grouped_linear(x_ND: Tensor, w_EFD: Tensor, count_E: Tensor) -> Tensor:
    """`y = x @ w[e].T` for each expert's rows. Returns [N, F]."""
    if not x_ND.is_cuda and by_onednn(x_ND.dtype):
        return few_shapes.grouped_linear(x_ND, w_EFD, count_E)
    end_E = count_E.to(x_ND.device).cumsum(0, dtype=torch.int32)
    return grouped_mm(x_ND, w_EFD.transpose(1, 2), offs=end_E)
