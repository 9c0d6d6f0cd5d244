"""RMSNorm that runs without Transformer Engine and under sequence parallelism."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jetmoe_megatron.model.config import JetMoEConfig


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension (Zhang and Sennrich, arXiv 1910.07467, equation 4)."""

    def __init__(self, config: JetMoEConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Each rank normalises its part of the sequence: finalize_model_grads sums the gradient over tensor ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class FinalRMSNorm(RMSNorm):
    """The norm before the output layer: the only one whose eps a JetMoE config can choose."""

    def __init__(self, config: JetMoEConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, config.final_norm_eps)
