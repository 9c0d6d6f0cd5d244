"""Which rows go to which expert, and to which rank, computed once per layer.

Attention lies between the two linear layers of its experts (queries and outputs), so such a layer sends its rows out
and back twice, by the same plan. Without an expert-parallel group nothing is sent, and the host does not wait for the
device unless the backend needs the counts on the host.

Letters: T tokens, K top-k, E experts of the whole layer, L local experts, R expert-parallel ranks, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import all_to_all
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher
from torch import Tensor
from torch.distributed import ProcessGroup

from jetmoe_megatron.model.experts import Backend, open_backend
from jetmoe_megatron.model.permutation import Permutation


class Dispatch:
    """The permutation that sorts the T * K (token, slot) pairs by expert, and the exchange among ranks.

    `count_L` tells the expert layers how many rows each local expert has.
    """

    def __init__(self, expert_TK: Tensor, num_experts: int, group: ProcessGroup | None, backend: Backend) -> None:
        """
        Args:
            expert_TK: the chosen expert of each slot of each token.
            group: ranks that each hold num_experts / R experts, in order; None if every rank holds all.
        """
        self.tokens, self.slots = expert_TK.shape
        self.group, self.backend = group, backend
        self.permutation = Permutation.by_expert(expert_TK, num_experts)
        self.count_L = self.permutation.count_E
        if group is not None:
            self._plan_exchange(self.count_L.long(), group)
        if backend.counts_on_host:
            self.count_L = self.count_L.cpu()

    def rows_of_tokens(self, x_TD: Tensor) -> Tensor:
        """One row for each slot of each token: [T, D] -> rows sorted by local expert."""
        return self._send(self.backend.gather(x_TD, self.permutation, self.slots))

    def rows_of_slots(self, x_TKD: Tensor) -> Tensor:
        """Each slot of each token: [T, K, D] -> rows sorted by local expert."""
        return self._send(self.backend.gather(x_TKD.flatten(0, 1), self.permutation, 1))

    def slots_of_rows(self, rows: Tensor) -> Tensor:
        """Back to the rank, token and slot they came from: rows -> [T, K, D]."""
        x = self.backend.scatter(self._send_back(rows), None, self.permutation, 1)
        return x.unflatten(0, (self.tokens, self.slots))

    def tokens_of_rows(self, rows: Tensor, gate_TK: Tensor) -> Tensor:
        """Back to the rank and token they came from, and the sum weighted by the gates: rows -> [T, D]."""
        return self.backend.scatter(self._send_back(rows), gate_TK, self.permutation, self.slots)

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
        self.arrival = Permutation.by_expert(expert_of_arrival.unsqueeze(1), count_RL.shape[1])

    def _send(self, rows: Tensor) -> Tensor:
        if self.group is None:
            return rows
        return self.backend.gather(all_to_all(self.group, rows, self.received, self.sent), self.arrival, 1)

    def _send_back(self, rows: Tensor) -> Tensor:
        if self.group is None:
            return rows
        return all_to_all(self.group, self.backend.scatter(rows, None, self.arrival, 1), self.sent, self.received)


class LocalTokenDispatcher(MoETokenDispatcher):
    """Replaces Megatron's token dispatcher if all experts of a layer are on the rank.

    Megatron's makes the host wait in every layer, and its combination adds atomically, in a different order each time.
    """

    def __init__(self, config: Any, pg_collection: Any) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.backend = open_backend(config.expert_backend)

    def dispatch_preprocess(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self.shape = hidden_states.shape
        gate_TK, expert_TK = probs.topk(self.config.moe_router_topk, dim=-1)
        self.dispatch = Dispatch(expert_TK, self.config.num_moe_experts, None, self.backend)
        return self.dispatch.rows_of_tokens(hidden_states.flatten(0, -2)), gate_TK

    def token_dispatch(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        return hidden_states, probs

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, None]:
        """The rows, their number for each expert, and None: the gates are applied in the combination."""
        self.gate_TK = probs
        return hidden_states, self.dispatch.count_L, None

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        return self.dispatch.tokens_of_rows(hidden_states, self.gate_TK)

    def token_combine(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        del self.dispatch, self.gate_TK
        return hidden_states.view(self.shape)
