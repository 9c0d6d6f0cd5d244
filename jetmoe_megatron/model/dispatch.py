"""Which rows go to which expert, and to which rank, worked out once per layer.

A layer whose experts have two linear layers with something in between (queries, attention, outputs) sends its rows
out and back twice, by the same plan. Without an expert-parallel group nothing is sent and nothing waits for the host.

Letters: T tokens, K top-k, E experts of the whole layer, L local experts, R expert-parallel ranks, D width.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup


class Dispatch:
    """The permutation that sorts the T * K (token, slot) pairs by expert, and the exchange among ranks.

    `count_L` tells the expert layers how many rows each local expert has.
    """

    def __init__(self, expert_TK: Tensor, num_experts: int, group: ProcessGroup | None) -> None:
        """
        Args:
            expert_TK: the chosen expert of each slot of each token.
            group: ranks that each hold num_experts / R experts, in order; None if every rank holds all.
        """
        self.tokens, self.slots = expert_TK.shape
        self.group = group
        flat = expert_TK.flatten()
        self.order = flat.argsort(stable=True)
        self.inverse = _inverse(self.order)
        self.count_L = flat.bincount(minlength=num_experts)
        if group is not None:
            self._plan_exchange(self.count_L, group)

    def rows_of_tokens(self, x_TD: Tensor) -> Tensor:
        """Each token once for each of its slots: [T, D] -> rows sorted by local expert."""
        return self._send(x_TD.index_select(0, self.order // self.slots))

    def rows_of_slots(self, x_TKD: Tensor) -> Tensor:
        """Each slot of each token: [T, K, D] -> rows sorted by local expert."""
        return self._send(x_TKD.flatten(0, 1).index_select(0, self.order))

    def slots_of_rows(self, rows: Tensor) -> Tensor:
        """Back to the rank, token and slot they came from: rows -> [T, K, D]."""
        if self.group is not None:
            rows = rows.index_select(0, self.arrival)
            rows = all_to_all(self.group, rows, self.sent, self.received)
        return rows.index_select(0, self.inverse).unflatten(0, (self.tokens, self.slots))

    def _plan_exchange(self, count_E: Tensor, group: ProcessGroup) -> None:
        ranks = group.size()
        count_RE = count_E.new_empty(ranks * count_E.numel())
        torch.distributed.all_gather_into_tensor(count_RE, count_E, group=group)
        count_RRL = count_RE.view(ranks, ranks, -1)  # from rank, to rank, local expert
        count_RL = count_RRL[:, group.rank()]
        self.sent: list[int] = count_E.view(ranks, -1).sum(1).tolist()
        self.received: list[int] = count_RL.sum(1).tolist()
        self.count_L = count_RL.sum(0)
        # Rows arrive by rank, then expert; the experts want them by expert, then rank.
        local_experts = torch.arange(count_RL.shape[1], device=count_E.device).expand_as(count_RL)
        expert_of_arrival = local_experts.flatten().repeat_interleave(count_RL.flatten())
        self.by_expert = expert_of_arrival.argsort(stable=True)
        self.arrival = _inverse(self.by_expert)

    def _send(self, rows: Tensor) -> Tensor:
        if self.group is None:
            return rows
        return all_to_all(self.group, rows, self.received, self.sent).index_select(0, self.by_expert)


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    return inverse
