"""The reference: one plain matmul per expert."""

from __future__ import annotations

import torch
from torch import Tensor


def grouped_linear(x_ND: Tensor, w_EFD: Tensor, count_E: Tensor) -> Tensor:
    """`y = x @ w[e].T` for each expert's rows. Returns [N, F]."""
    # unbind, not w[e]: the gradient of an index is a full-size tensor of zeros for every expert.
    groups = zip(x_ND.split(count_E.tolist()), w_EFD.unbind(0), strict=True)
    return torch.cat([x_nD @ w_FD.T for x_nD, w_FD in groups])
