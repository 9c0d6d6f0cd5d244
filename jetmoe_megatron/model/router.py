"""The top-k router of both kinds of experts, with its losses attached and recorded (`router_losses.py`).

Letters: S local sequence, B micro-batch, H hidden, T local tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from jetmoe_megatron.model.config import JetMoEConfig
from jetmoe_megatron.model.router_losses import balance_and_z
from jetmoe_megatron.model.router_record import RouterRecord, entropy_and_margin


class Router(TopKRouter):
    """Megatron's router, but with logits in fp32, and with losses that are attached and recorded here.

    Megatron records its losses by name in a module global, and never reduces its z-loss over ranks.
    """

    kind: str  # "moa" (attention) or "moe" (MLP): the prefix of its numbers in the metrics

    def __init__(
        self, config: JetMoEConfig, pg_collection: ProcessGroupCollection | None = None, **of_newer_versions: Any
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection, **of_newer_versions)
        self.record = RouterRecord()
        self.counting = False  # in the pass before a step with losses.scope: global_batch
        # Integers: Megatron casts floating-point buffers to bf16, which cannot count beyond 256.
        self.register_buffer("count_E", torch.zeros(config.num_moe_experts, dtype=torch.int64), persistent=False)

    def gating(self, input: Tensor) -> Tensor:
        """Logits in fp32. Megatron's own needs Transformer Engine in 0.16: without it, a name is not defined there
        (moe_utils.py, `RouterGatingLinearFunction`)."""
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
            gates_TK = self._attach_losses(gates_TK, logits_TE, chosen_TE.sum(0))
        gates_TE = torch.zeros_like(logits_TE).scatter(1, index_TK, gates_TK)
        return gates_TE, chosen_TE

    def _attach_losses(self, gates_TK: Tensor, logits_TE: Tensor, own_E: Tensor) -> Tensor:
        """own_E: this rank's assignments to each expert."""
        config, group, record = self.config, self.tp_cp_group, self.record
        count_E = self.count_E
        if not config.global_balance:
            count_E = own_E
            if group.size() > 1:
                count_E = own_E.clone()
                torch.distributed.all_reduce(count_E, group=group)
        share_E = count_E / count_E.sum()
        balance, z = (loss / group.size() for loss in balance_and_z(logits_TE, share_E))
        entropy, margin = entropy_and_margin(logits_TE)
        record.load_E = record.load_E + own_E
        record.balance_loss = record.balance_loss + balance.detach()
        record.z_loss = record.z_loss + z.detach()
        record.load_imbalance = record.load_imbalance + share_E.max() * (share_E.numel() / group.size())
        record.gate_entropy = record.gate_entropy + entropy
        record.top1_margin = record.top1_margin + margin
        record.micro_batches += 1.0 / group.size()
        loss = config.moe_aux_loss_coeff * balance + config.moe_z_loss_coeff * z
        return MoEAuxLossAutoScaler.apply(gates_TK, loss)


class _Gating(torch.autograd.Function):
    """`x @ w.T` in fp32, forward and backward. It keeps the input in its own dtype, not the copy in fp32."""

    @staticmethod
    def forward(ctx: Any, x_SBH: Tensor, w_EH: Tensor) -> Tensor:
        ctx.save_for_backward(x_SBH, w_EH)
        return torch.nn.functional.linear(x_SBH.float(), w_EH.float())

    @staticmethod
    def backward(ctx: Any, g_SBE: Tensor) -> tuple[Tensor, Tensor]:
        x_SBH, w_EH = ctx.saved_tensors
        g_EH = g_SBE.flatten(0, 1).t() @ x_SBH.flatten(0, 1).float()
        return (g_SBE @ w_EH.float()).to(x_SBH.dtype), g_EH.to(w_EH.dtype)


class AttentionRouter(Router):
    kind = "moa"


class MLPRouter(Router):
    kind = "moe"


def routers(model: list[DistributedDataParallel]) -> Iterator[Router]:
    """The routers in all chunks of this pipeline stage."""
    for chunk in model:
        for module in chunk.modules():
            if isinstance(module, Router):
                yield module
