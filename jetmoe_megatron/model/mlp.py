"""The dropless mixture of MLP experts: Megatron's MoELayer and the one output bias that JetMoE adds."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor, nn

from jetmoe_megatron.model.config import JetMoEConfig
from jetmoe_megatron.model.token_dispatcher import LocalTokenDispatcher


class MixtureOfMLPs(MoELayer):
    """Routing, and dispatch among ranks, are Megatron's. The bias is added after the combination, not gated."""

    def __init__(self, config: JetMoEConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        groups = get_default_pg_collection()
        if groups.ep.size() == groups.expt_tp.size() == 1:
            self.token_dispatcher = LocalTokenDispatcher(config, groups)
        self.bias = output_bias(config)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """[S, B, H] -> the same, and the bias [H] for TransformerLayer to add; None if `postprocess` has added it."""
        output, _ = super().forward(hidden_states, **kwargs)
        return output, None if self.config.overlap_moe_expert_parallel_comm else self.bias

    # Megatron's overlap of the exchange with another micro-batch calls the steps of this layer one by one. It does not
    # call `forward` (models/gpt/fine_grained_callables.py, `submodule_combine_forward`).

    def routed_experts_compute(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """Rows from all ranks -> the outputs of this rank's experts, and no bias."""
        if self.config.overlap_moe_expert_parallel_comm and self.num_local_experts == 1:
            # Megatron frees the received rows as if sorting by expert had copied them (pipeline_parallel/utils.py,
            # `ScheduleNode`).
            hidden_states = hidden_states.clone()
        return super().routed_experts_compute(hidden_states, probs)

    def postprocess(self, output: Tensor, shared_expert_output: None) -> Tensor:
        """The experts' outputs, back in their places [S, B, H]; with the bias if `forward` is not called."""
        output = super().postprocess(output, shared_expert_output)
        if not self.config.overlap_moe_expert_parallel_comm:
            return output
        for wait_for_weights in self._forward_pre_hooks.values():  # DDP's hooks, which a call of the layer would run
            wait_for_weights(self, ())
        return output + self.bias


def output_bias(config: JetMoEConfig) -> nn.Parameter:
    """A bias [H] that is added to a rank's part of the sequence: its gradient is summed over tensor ranks."""
    bias = nn.Parameter(torch.zeros(config.hidden_size, dtype=config.params_dtype))
    bias.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return bias
