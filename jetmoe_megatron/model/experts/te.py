"""Transformer Engine's grouped linear layer, which Megatron-Core's TEGroupedMLP is made of.

Its module owns one weight per expert. Here they are views of the one parameter, put in its place for each call.
"""

from __future__ import annotations

import functools

import torch
import transformer_engine.pytorch as te
from torch import Tensor
from transformer_engine.common.recipe import Float8CurrentScaling

_FP8_ROWS = 16  # fp8 matmuls want each expert's rows to be a multiple of this


def grouped_linear(x_ND: Tensor, w_EFD: Tensor, count_E: Tensor) -> Tensor:
    """`y = x @ w[e].T` for each expert's rows. Returns [N, F]."""
    return _linear(x_ND, w_EFD, count_E.tolist())


def grouped_linear_fp8(x_ND: Tensor, w_EFD: Tensor, count_E: Tensor) -> Tensor:
    """The same in fp8, forward and backward, each tensor scaled by its own largest value: no history to keep."""
    experts, counts = len(w_EFD), count_E.tolist()
    x_MD, padded = te.Fp8Padding(experts, _FP8_ROWS)(x_ND, counts)
    with te.fp8_autocast(enabled=True, fp8_recipe=Float8CurrentScaling()):
        y_MF = _linear(x_MD, w_EFD, padded)
    return te.Fp8Unpadding(experts, _FP8_ROWS)(y_MF, counts)


def _linear(x_ND: Tensor, w_EFD: Tensor, counts: list[int]) -> Tensor:
    module = _module(*w_EFD.shape, w_EFD.dtype)
    for expert, w_FD in enumerate(w_EFD.unbind(0)):
        setattr(module, f"weight{expert}", w_FD)
    y_NF = module(x_ND, counts)
    for expert in range(len(w_EFD)):  # else they keep this layer, and through its hooks the model, until the next call
        setattr(module, f"weight{expert}", None)
    return y_NF


@functools.cache
def _module(experts: int, width_out: int, width_in: int, dtype: torch.dtype) -> te.GroupedLinear:
    """One for all layers of a shape, without weights of its own."""
    module = te.GroupedLinear(experts, width_in, width_out, bias=False, params_dtype=dtype, device="meta")
    for expert in range(experts):
        delattr(module, f"weight{expert}")
        setattr(module, f"bias{expert}", torch.empty(0, dtype=dtype, device=torch.cuda.current_device()))
    return module
