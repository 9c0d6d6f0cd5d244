"""The dropless mixture of MLP experts: Megatron's MoELayer and the one output bias that JetMoE adds."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor, nn

from jetmoe_megatron.model.config import JetMoEConfig
from jetmoe_megatron.model.dispatch import LocalTokenDispatcher


class MixtureOfMLPs(MoELayer):
    """Routing, and dispatch among ranks, are Megatron's. The bias is added after the combination, not gated."""

    def __init__(self, config: JetMoEConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        groups = get_default_pg_collection()
        if groups.ep.size() == groups.expt_tp.size() == 1:
            self.token_dispatcher = LocalTokenDispatcher(config, groups)
        self.bias = output_bias(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """[S, B, H] -> the same and the bias [H], which TransformerLayer adds."""
        output, _ = super().forward(hidden_states, **kwargs)
        return output, self.bias


def output_bias(config: JetMoEConfig) -> nn.Parameter:
    """A bias [H] that is added to a rank's part of the sequence: its gradient is summed over tensor ranks."""
    bias = nn.Parameter(torch.zeros(config.hidden_size, dtype=config.params_dtype))
    bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return bias
