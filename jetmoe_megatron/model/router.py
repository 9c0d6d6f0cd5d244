"""The top-k router, its balance loss and its z-loss: the one place where both formulas and their scaling stand.

For the logits s [T, E] of one router, over the T tokens of one micro-batch (arXiv 2404.07413, equations 10 to 12):

    balance = E * sum_i f_i * P_i        f_i: share of assignments that went to expert i, without a gradient
                                         P_i: mean over tokens of softmax(s)_i over all E experts
    z       = mean over tokens of logsumexp(s)^2

A perfectly even router has balance = 1. The training loss is

    L = L_lm + sum over routers ( c_balance * balance + c_z * z )

the sum over all routers of both kinds, two in each layer, as the authors' training code has it, averaged over
micro-batches and data-parallel ranks like L_lm. Both terms enter the gradient through Megatron's
MoEAuxLossAutoScaler, which carries the same scale as the main loss on every pipeline stage. With sequence
parallelism a rank has T / tp tokens: its partial terms add up over the tensor-parallel group.

With `losses.scope: micro_batch` f_i counts the T * K assignments of the micro-batch, on all its ranks: the loss does
not depend on tensor, pipeline and expert parallelism or recomputation, but on what is in one micro-batch.
With `global_batch` f_i counts those of the whole step. As balance is linear in P_i, its mean over micro-batches is then
that of the global batch, however it is split. The counts must be known before the first backward pass: they come
from a forward pass of their own (`training/step.py`).

Letters: S local sequence, B micro-batch, H hidden, T local tokens, E experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from jetmoe_megatron.model.config import JetMoEConfig
from jetmoe_megatron.model.fusion import fused


@dataclass
class RouterLosses:
    """Sums over the micro-batches since the last `reset`, before their coefficients, of this rank's share."""

    balance: Tensor | float = 0.0
    z: Tensor | float = 0.0
    load_imbalance: Tensor | float = 0.0  # what the busiest expert gets, where 1 is an even share
    micro_batches: float = 0.0  # a tensor-parallel rank counts as a part of one

    def reset(self) -> None:
        self.balance, self.z, self.load_imbalance, self.micro_batches = 0.0, 0.0, 0.0, 0.0


class Router(TopKRouter):
    """Megatron's router with its logits in fp32 and its losses attached and recorded as written above.

    Megatron's own records are kept by name in a module global, and its z-loss is never reduced over ranks.
    """

    kind: str  # "moa" or "moe": how the losses are named in the metrics

    def __init__(self, config: JetMoEConfig, pg_collection: ProcessGroupCollection | None = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.losses = RouterLosses()
        self.counting = False  # in the pass before a step with losses.scope: global_batch
        # Integers: Megatron casts what is floating-point to bf16, which cannot count beyond 256.
        self.register_buffer("count_E", torch.zeros(config.num_moe_experts, dtype=torch.int64), persistent=False)

    def gating(self, input: Tensor) -> Tensor:
        """Logits in fp32. Megatron's own needs Transformer Engine (moe_utils.py:1192 reads an unbound name)."""
        return _Gating.apply(input, self.weight)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [S, B, E] -> gates [T, E], zero where not chosen, and the choice as a boolean map [T, E]."""
        logits_TE = logits.flatten(0, 1)
        top_TK, index_TK = logits_TE.topk(self.topk, dim=-1)
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, index_TK, True)
        gates_TK = top_TK.softmax(dim=-1)
        if self.counting:
            self.count_E += chosen_TE.sum(0)
        elif self.training and torch.is_grad_enabled():  # not in the first pass of a recomputed layer
            gates_TK = self._attach_losses(gates_TK, logits_TE, chosen_TE)
        gates_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, gates_TK)
        return gates_TE, chosen_TE

    def _attach_losses(self, gates_TK: Tensor, logits_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        config, group = self.config, self.tp_cp_group
        count_E = self.count_E
        if not config.global_balance:
            count_E = chosen_TE.sum(0)
            if group.size() > 1:
                torch.distributed.all_reduce(count_E, group=group)
        share_E = count_E / count_E.sum()
        balance, z = (loss / group.size() for loss in _Losses.apply(logits_TE, share_E))
        self.losses.balance = self.losses.balance + balance.detach()
        self.losses.z = self.losses.z + z.detach()
        self.losses.load_imbalance = self.losses.load_imbalance + share_E.max() * (share_E.numel() / group.size())
        self.losses.micro_batches += 1.0 / group.size()
        loss = config.moe_aux_loss_coeff * balance + config.moe_z_loss_coeff * z
        return MoEAuxLossAutoScaler.apply(gates_TK, loss)


class _Gating(torch.autograd.Function):
    """`x @ w.T` in fp32, forward and backward, of which only the input as it came is kept, not its copy in fp32."""

    @staticmethod
    def forward(ctx: Any, x_SBH: Tensor, w_EH: Tensor) -> Tensor:
        ctx.save_for_backward(x_SBH, w_EH)
        return torch.nn.functional.linear(x_SBH.float(), w_EH.float())

    @staticmethod
    def backward(ctx: Any, g_SBE: Tensor) -> tuple[Tensor, Tensor]:
        x_SBH, w_EH = ctx.saved_tensors
        g_EH = g_SBE.flatten(0, 1).t() @ x_SBH.flatten(0, 1).float()
        return (g_SBE @ w_EH.float()).to(x_SBH.dtype), g_EH.to(w_EH.dtype)


class _Losses(torch.autograd.Function):
    """balance and z of the logits [T, E] and the share f [E] of the assignments, over this rank's tokens."""

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


class AttentionRouter(Router):
    kind = "moa"


class MLPRouter(Router):
    kind = "moe"
