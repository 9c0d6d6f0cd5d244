"""The experts of the MLP: SwiGLU, for each token that of its chosen experts (arXiv 2404.07413, equation 4)."""

from __future__ import annotations

import contextlib

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from jetmoe_megatron.model.config import JetMoEConfig
from jetmoe_megatron.model.experts.recompute import Recomputed
from jetmoe_megatron.model.experts.sharded_weights import ExpertLinear
from jetmoe_megatron.model.experts.swiglu import swiglu


class GLUExperts(MegatronModule):
    """Replaces Megatron's expert classes, which follow its token dispatcher."""

    def __init__(
        self,
        num_local_experts: int,
        config: JetMoEConfig,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,  # newer versions of Megatron-Core give each module its name
    ) -> None:
        super().__init__(config=config)
        experts, hidden, ffn = config.num_moe_experts, config.hidden_size, config.ffn_hidden_size
        groups = {
            "expert_group": pg_collection.ep if pg_collection.ep.size() > 1 else None,
            "tensor_group": pg_collection.expt_tp,
            "replica_group": pg_collection.expt_dp,
            "delay_gradient": config.delay_wgrad_compute or config.delays_mlp_experts_only,
        }
        # The two halves are a separate axis, so that splitting the width splits both halves in the same way.
        self.linear_in = ExpertLinear(config, (experts, 2, ffn, hidden), tensor_axis=2, **groups)
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
        a_NF = swiglu(x_N2F)
        with Recomputed(swiglu, x_N2F, a_NF).hooks() if self.config.recompute_activation else contextlib.nullcontext():
            y_ND = self.linear_out(a_NF, count_E)
        return y_ND if gate_N is None else y_ND * gate_N.unsqueeze(-1).to(y_ND.dtype), None

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients."""
        self.linear_out.backward_dw()
        self.linear_in.backward_dw()
