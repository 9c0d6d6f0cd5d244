"""Sorts rows of tokens by expert and puts them back, with torch operations that every backend can use.

The backward pass of each function is the forward pass of the other. Gradients are gathered, never added atomically, so
they are the same in every run.

Letters: T tokens, K top-k, N = T * K rows, E experts, D width.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jetmoe_megatron.model.fusion import fused


@dataclass(frozen=True)
class Permutation:
    """The order that sorts the (token, slot) pairs by expert, and where each expert's rows end. All on the device."""

    order_N: Tensor  # the pair, token * K + slot, of each row
    inverse_N: Tensor  # the row of each pair
    expert_N: Tensor  # the expert of each row, sorted
    end_E: Tensor  # int32

    @staticmethod
    def by_expert(expert_TK: Tensor, num_experts: int) -> Permutation:
        """Does not make the host wait for the device, as `bincount` would."""
        expert_N, order_N = expert_TK.flatten().sort(stable=True)
        inverse_N = torch.empty_like(order_N)
        inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
        experts = torch.arange(num_experts, device=order_N.device)
        return Permutation(
            order_N, inverse_N, expert_N, torch.searchsorted(expert_N, experts, right=True, out_int32=True)
        )

    @property
    def count_E(self) -> Tensor:
        return self.end_E.diff(prepend=self.end_E.new_zeros(1))


def gather(x_TD: Tensor, permutation: Permutation, slots: int) -> Tensor:
    """One row for each slot of each token, sorted by expert: [T, D] -> [N, D]. One slot: a plain permutation."""
    return _Gather.apply(x_TD, permutation.order_N, permutation.inverse_N, slots)


def scatter(y_ND: Tensor, gate_TK: Tensor | None, permutation: Permutation, slots: int) -> Tensor:
    """Rows back to their tokens, summed over slots, weighted by the gates if there are any: [N, D] -> [T, D]."""
    if gate_TK is None:
        return _Scatter.apply(y_ND, permutation.order_N, permutation.inverse_N, slots)
    return _WeightedScatter.apply(y_ND, gate_TK, permutation.order_N, permutation.inverse_N)


def _copies(x_TD: Tensor, order_N: Tensor, slots: int) -> Tensor:
    return x_TD.index_select(0, order_N if slots == 1 else order_N // slots)


@fused
def _sums(y_ND: Tensor, inverse_N: Tensor, slots: int) -> Tensor:
    return _over_slots(y_ND.index_select(0, inverse_N).unflatten(0, (-1, slots)))


@fused
def _weighted_sums(y_ND: Tensor, gate_TK: Tensor, inverse_N: Tensor) -> Tensor:
    y_TKD = y_ND.index_select(0, inverse_N).unflatten(0, gate_TK.shape)
    return _over_slots(y_TKD * gate_TK.unsqueeze(-1).to(y_ND.dtype))


def _over_slots(y_TKD: Tensor) -> Tensor:
    """The same as `sum(1)`, which is several times slower on a CPU for such a short dimension."""
    return functools.reduce(torch.add, y_TKD.unbind(1))


@fused
def _weighted_sums_gradients(
    g_TD: Tensor, y_ND: Tensor, gate_TK: Tensor, order_N: Tensor, inverse_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the rows [N, D] and of the gates [T, K]."""
    g_ND = g_TD.index_select(0, order_N // gate_TK.shape[1])
    dot_N = (g_ND * y_ND).sum(-1, dtype=gate_TK.dtype)
    gate_N = gate_TK.flatten().index_select(0, order_N)
    return g_ND * gate_N.unsqueeze(-1).to(g_ND.dtype), dot_N.index_select(0, inverse_N).view(gate_TK.shape)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, inverse_N: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(inverse_N)
        ctx.slots = slots
        return _copies(x_TD, order_N, slots)

    @staticmethod
    def backward(ctx: Any, g_ND: Tensor) -> tuple[Tensor | None, ...]:
        (inverse_N,) = ctx.saved_tensors
        return _sums(g_ND, inverse_N, ctx.slots), None, None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, order_N: Tensor, inverse_N: Tensor, slots: int) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.slots = slots
        return _sums(y_ND, inverse_N, slots)

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor | None, ...]:
        (order_N,) = ctx.saved_tensors
        return _copies(g_TD, order_N, ctx.slots), None, None, None


class _WeightedScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, gate_TK: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, gate_TK, order_N, inverse_N)
        return _weighted_sums(y_ND, gate_TK, inverse_N)

    @staticmethod
    def backward(ctx: Any, g_TD: Tensor) -> tuple[Tensor | None, ...]:
        y_ND, gate_TK, order_N, inverse_N = ctx.saved_tensors
        return *_weighted_sums_gradients(g_TD, y_ND, gate_TK, order_N, inverse_N), None, None
