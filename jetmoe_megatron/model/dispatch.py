"""Which rows go to which expert, worked out once per layer.

Letters: T tokens, K top-k, E experts, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Dispatch:
    """The permutation that sorts the T * K (token, slot) pairs by expert, and its inverse."""

    def __init__(self, expert_TK: Tensor, num_experts: int) -> None:
        self.tokens, self.slots = expert_TK.shape
        flat = expert_TK.flatten()
        self.order = flat.argsort(stable=True)
        self.inverse = torch.empty_like(self.order)
        self.inverse[self.order] = torch.arange(self.order.numel(), device=flat.device)
        self.count_E = flat.bincount(minlength=num_experts)

    def rows_of_tokens(self, x_TD: Tensor) -> Tensor:
        """Each token once for each of its slots, sorted by expert: [T, D] -> [T * K, D]."""
        return x_TD.index_select(0, self.order // self.slots)

    def rows_of_slots(self, x_TKD: Tensor) -> Tensor:
        """Each slot of each token, sorted by expert: [T, K, D] -> [T * K, D]."""
        return x_TKD.flatten(0, 1).index_select(0, self.order)

    def slots_of_rows(self, rows: Tensor) -> Tensor:
        """Back to the order of tokens and slots: [T * K, D] -> [T, K, D]."""
        return rows.index_select(0, self.inverse).unflatten(0, (self.tokens, self.slots))
