"""Balance loss and z-loss of the routers: the one place with both formulas and their scaling.

In the metrics, the losses of the attention routers are `moa_balance_loss` and `moa_z_loss`, and those of the MLP
routers `moe_balance_loss` and `moe_z_loss`.

For the logits s [T, E] of one router, over the T tokens of one micro-batch (arXiv 2404.07413, equations 10 to 12):

    balance = E * sum_i f_i * P_i        f_i: share of assignments that went to expert i, without a gradient
                                         P_i: mean over tokens of softmax(s)_i over all E experts
    z       = mean over tokens of logsumexp(s)^2

A perfectly even router has balance = 1. The training loss is

    L = L_lm + sum over routers ( c_balance * balance + c_z * z )

with the sum over all routers of both kinds, two in each layer, as in the authors' training code. The terms are
averaged over micro-batches and data-parallel ranks, like L_lm. Both enter the gradient through Megatron's
MoEAuxLossAutoScaler, which carries the same scale as the main loss on every pipeline stage. With sequence
parallelism a rank has T / tp tokens, and the partial terms of the ranks add up over the tensor-parallel group.

With `losses.scope: micro_batch`, f_i counts the T * K assignments of the micro-batch, on all its ranks. The loss does
not depend on tensor, pipeline or expert parallelism or on recomputation, but it depends on what is in a micro-batch.
With `global_batch`, f_i counts the assignments of the whole step. Balance is linear in P_i, so its mean over
micro-batches is then that of the global batch, however that is split. The counts must be known before the first
backward pass, so they come from a separate forward pass (`training/step.py`).

Letters: T local tokens, E experts, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from jetmoe_megatron.model.fusion import fused


def balance_and_z(logits_TE: Tensor, share_E: Tensor) -> tuple[Tensor, Tensor]:
    """Both losses over this rank's tokens, from the logits and each expert's share f of the assignments."""
    return _BalanceAndZ.apply(logits_TE, share_E)


class _BalanceAndZ(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, share_E: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(logits_TE, share_E)
        return _balance_and_z(logits_TE, share_E)

    @staticmethod
    def backward(ctx: Any, g_balance: Tensor, g_z: Tensor) -> tuple[Tensor, None]:
        return _gradient(*ctx.saved_tensors, g_balance, g_z), None


@fused
def _balance_and_z(logits_TE: Tensor, share_E: Tensor) -> tuple[Tensor, Tensor]:
    probability_E = logits_TE.softmax(dim=-1).mean(0)
    return share_E.numel() * (share_E * probability_E).sum(), logits_TE.logsumexp(dim=-1).square().mean()


@fused
def _gradient(logits_TE: Tensor, share_E: Tensor, g_balance: Tensor, g_z: Tensor) -> Tensor:
    probability_TE = logits_TE.softmax(dim=-1)
    excess_TE = share_E - (probability_TE * share_E).sum(dim=-1, keepdim=True)
    z_T1 = 2 * logits_TE.logsumexp(dim=-1, keepdim=True)
    return probability_TE * (g_balance * share_E.numel() * excess_TE + g_z * z_T1) / logits_TE.shape[0]
