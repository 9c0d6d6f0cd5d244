"""Megatron's flexible dispatcher with our router and experts equals one process.

DeepEP runs on GPUs only. Its two functions are written here over gloo, by what its documentation says that they do: a
token is sent once to each rank that has one of its experts, and what comes back is summed.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from tests.parallel.oracle import joined, train
from tests.parallel.test_equal_to_one_process import check_equal, one_process, run_tree
from tests.ranks import run_ranks


def dispatch(x_TH: Tensor, expert_TK: Tensor, gate_TK: Tensor, num_experts: int, group: Any, **options: Any) -> Any:
    """Returns the received rows, their experts (-1: not here) and gates, the rows of each expert, and a handle."""
    ranks, rank = group.size(), group.rank()
    local = num_experts // ranks
    goes_to_RT = torch.stack([(expert_TK // local == other).any(1) for other in range(ranks)])
    sent = goes_to_RT.sum(1)
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent, group=group)
    splits = received.tolist(), sent.tolist()
    token_N = torch.cat([goes.nonzero().flatten() for goes in goes_to_RT])
    rows = exchange(group, x_TH[token_N], *splits)
    gates = exchange(group, gate_TK[token_N], *splits)
    experts = exchange(group, expert_TK[token_N].float(), *splits).long()
    here = experts // local == rank
    experts = torch.where(here, experts % local, -1)
    count_L = experts[here].bincount(minlength=local)
    return rows, experts, torch.where(here, gates, 0), count_L, (token_N, splits, len(x_TH))


def combine(rows: Tensor, group: Any, handle: Any, **options: Any) -> tuple[Tensor, None]:
    token_N, (received, sent), tokens = handle
    back = exchange(group, rows, sent, received)
    return torch.zeros(tokens, rows.shape[1], dtype=rows.dtype).index_add(0, token_N, back), None


def exchange(group: Any, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
    from megatron.core.tensor_parallel.mappings import all_to_all

    return all_to_all(group, rows.contiguous(), received, sent)


def train_with_deepep(tree: dict[str, Any]) -> Any:
    """In fp32, where differences show."""
    name = "megatron.core.transformer.moe.token_dispatcher"
    with ExitStack() as stack:
        stack.enter_context(patch("jetmoe_megatron.config.layout._check_exchange", lambda run: None))
        stack.enter_context(patch(f"{name}.fused_dispatch", dispatch))
        stack.enter_context(patch(f"{name}.fused_combine", combine))
        stack.enter_context(patch(f"{name}.set_deepep_num_sms", lambda number: None))
        return train(tree, 3, None)


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        pytest.param(2, {"expert": 2}, id="ep2"),
        pytest.param(4, {"expert": 4}, id="ep4, one expert on a rank"),
        pytest.param(
            4, {"expert": 2, "tensor": 2, "expert_tensor": 2, "attention_experts": "sharded"}, id="tp2 etp2 ep2"
        ),
    ],
)
def test_equals_one_process(ranks: int, parallel: dict[str, Any]) -> None:
    tree = run_tree(parallel={**parallel, "moe_token_dispatcher": "deepep"})
    check_equal(joined(run_ranks(ranks, train_with_deepep, tree)), one_process({}))
