"""Transformer Engine's grouped linear layer in fp8, with weights and activations kept in bf16."""

from __future__ import annotations

import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.common.recipe import Float8CurrentScaling

from jetmoe_megatron.model.experts.te import linear

_ROWS = 16  # fp8 matmuls need the number of rows of each expert to be a multiple of this


def grouped_linear(x_ND: Tensor, w_EFD: Tensor, count_E: Tensor) -> Tensor:
    """`y = x @ w[e].T` for each expert's rows, forward and backward in fp8. Returns [N, F].

    Each tensor is scaled by its own largest value: no history to keep.
    """
    experts, counts = len(w_EFD), count_E.tolist()
    x_MD, padded = te.Fp8Padding(experts, _ROWS)(x_ND, counts)
    with te.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
        y_MF = linear(x_MD, w_EFD, padded)
    return te.Fp8Unpadding(experts, _ROWS)(y_MF, counts)
