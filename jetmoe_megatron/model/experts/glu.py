"""The experts of the MLP: SwiGLU, for each token that of its chosen experts (arXiv 2404.07413, equation 4)."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from jetmoe_megatron.model.config import JetMoEConfig
from jetmoe_megatron.model.experts.sharded_weights import ExpertLinear
from jetmoe_megatron.model.experts.swiglu import swiglu


class GLUExperts(MegatronModule):
    """Replaces Megatron's GroupedMLP, which follows its token dispatcher."""

    def __init__(self, num_local_experts: int, config: JetMoEConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        experts, hidden, ffn = config.num_moe_experts, config.hidden_size, config.ffn_hidden_size
        groups = {
            "expert_group": pg_collection.ep if pg_collection.ep.size() > 1 else None,
            "tensor_group": pg_collection.expt_tp,
            "replica_group": pg_collection.expt_dp,
        }
        # The two halves are a separate axis, so that splitting the width splits both halves in the same way.
        self.linear_in = ExpertLinear(config, (experts, 2, ffn, hidden), tensor_axis=2, **groups)
        self.recompute_activation = (
            config.recompute_granularity == "selective" and "moe_act" in config.recompute_modules
        )
        self.linear_out = ExpertLinear(config, (experts, hidden, ffn), tensor_axis=2, **groups)

    def forward(self, x_ND: Tensor, count_E: Tensor, gate_N: Tensor | None) -> tuple[Tensor, None]:
        """
        Args:
            x_ND: dispatched tokens, sorted by local expert.
            count_E: the number of rows of each local expert.
            gate_N: the router's weight of each row; None if the combination applies it.

        Returns:
            The outputs [N, hidden], and None because MoELayer takes no bias from its experts.
        """
        x_N2F = self.linear_in(x_ND, count_E)
        if self.recompute_activation:
            checkpoint = CheckpointWithoutOutput(fp8=None)  # False counts as True there (random.py:636)
            y_ND = self.linear_out(checkpoint.checkpoint(swiglu, x_N2F), count_E)
            checkpoint.discard_output_and_register_recompute(y_ND)
        else:
            y_ND = self.linear_out(swiglu(x_N2F), count_E)
        return y_ND if gate_N is None else y_ND * gate_N.unsqueeze(-1).to(y_ND.dtype), None

    def backward_dw(self) -> None:
        """Megatron's hook for a delayed weight gradient. Does nothing: ours is computed in the backward pass."""
