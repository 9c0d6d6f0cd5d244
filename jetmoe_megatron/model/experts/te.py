"""Transformer Engine's grouped linear layer, which Megatron-Core's TEGroupedMLP uses.

Its module owns one weight per expert. Here these weights are views of our one parameter, set before each call.
"""

from __future__ import annotations

import functools

import torch
import transformer_engine.pytorch as te
from torch import Tensor


def grouped_linear(x_ND: Tensor, w_EFD: Tensor, count_E: Tensor) -> Tensor:
    """`y = x @ w[e].T` for each expert's rows. Returns [N, F]."""
    return linear(x_ND, w_EFD, count_E.tolist())


def linear(x_ND: Tensor, w_EFD: Tensor, counts: list[int]) -> Tensor:
    """`grouped_linear` with the counts on the host."""
    module = _module(*w_EFD.shape, w_EFD.dtype)
    for expert, w_FD in enumerate(w_EFD.unbind(0)):
        setattr(module, f"weight{expert}", w_FD)
    y_NF = module(x_ND, counts)
    for expert in range(len(w_EFD)):  # they would keep this layer, and through its hooks the model, alive
        setattr(module, f"weight{expert}", None)
    return y_NF


@functools.cache
def _module(experts: int, width_out: int, width_in: int, dtype: torch.dtype) -> te.GroupedLinear:
    """One module for all layers of a shape, without weights."""
    module = te.GroupedLinear(experts, width_in, width_out, bias=False, params_dtype=dtype, device="meta")
    for expert in range(experts):
        delattr(module, f"weight{expert}")
        setattr(module, f"bias{expert}", torch.empty(0, dtype=dtype, device=torch.cuda.current_device()))
    return module
