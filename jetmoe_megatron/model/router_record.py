"""What a router did in a step: its losses, the load of its experts and how sure it was.

Letters: T local tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jetmoe_megatron.model.fusion import fused


@dataclass
class RouterRecord:
    """This rank's share, summed over the micro-batches since the last `reset`. The losses are without coefficients."""

    load_E: Tensor | int = 0  # assignments to each expert
    balance_loss: Tensor | float = 0.0
    z_loss: Tensor | float = 0.0
    load_imbalance: Tensor | float = 0.0  # the busiest expert's load in a micro-batch; 1 is an even share
    gate_entropy: Tensor | float = 0.0  # summed over tokens, in nats
    top1_margin: Tensor | float = 0.0  # summed over tokens
    micro_batches: float = 0.0  # each of the n ranks that share a micro-batch counts 1 / n

    def reset(self) -> None:
        self.__init__()  # type: ignore[misc]


@torch.no_grad()
@fused
def entropy_and_margin(logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over tokens: the entropy in nats of the softmax over all experts, and by how much its largest entry is above
    the second largest."""
    log_TE = logits_TE.log_softmax(dim=-1)
    probability_TE = log_TE.exp()
    first_T = probability_TE.amax(dim=-1)
    second_T = probability_TE.scatter(1, probability_TE.argmax(dim=-1, keepdim=True), 0.0).amax(dim=-1)
    return -(probability_TE * log_TE).sum(), (first_T - second_T).sum()
