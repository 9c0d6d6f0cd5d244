"""The fused functions give the same with torch.compile as without, and each compiles to one graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch

from jetmoe_megatron.model import permutation, rotary, router_losses, router_record
from jetmoe_megatron.model.experts import swiglu
from tests.model.experts_oracle import EXPERTS, choices

TOKENS, SLOTS, HEADS, CHANNELS = 12, 2, 3, 8
ORDER = permutation.Permutation.by_expert(choices("uneven", TOKENS, SLOTS), EXPERTS)
ROWS, GATES, TOKEN = torch.randn(TOKENS * SLOTS, 16), torch.rand(TOKENS, SLOTS), torch.randn(TOKENS, 16)
LOGITS, SHARE = torch.randn(TOKENS, EXPERTS), torch.rand(EXPERTS)
TURNS = torch.randn(TOKENS, 1, 1, 1, CHANNELS // 2), torch.randn(TOKENS, 1, 1, 1, CHANNELS // 2)
CALLS: dict[str, tuple[Callable, tuple]] = {
    "sums": (permutation._sums, (ROWS, ORDER.inverse_N, SLOTS)),
    "sums of one slot": (permutation._sums, (ROWS, ORDER.inverse_N, 1)),
    "weighted sums": (permutation._weighted_sums, (ROWS, GATES, ORDER.inverse_N)),
    "gradients of weighted sums": (
        permutation._weighted_sums_gradients,
        (TOKEN, ROWS, GATES, ORDER.order_N, ORDER.inverse_N),
    ),
    "swiglu": (swiglu._forward, (ROWS,)),
    "its gradient": (swiglu._gradient, (ROWS[:, :8], ROWS)),
    "losses of a router": (router_losses._balance_and_z, (LOGITS, SHARE)),
    "their gradient": (router_losses._gradient, (LOGITS, SHARE, torch.tensor(0.3), torch.tensor(0.2))),
    "how sure a router was": (router_record.entropy_and_margin, (LOGITS,)),
    "turned": (rotary._turned, (torch.randn(TOKENS, 1, SLOTS, HEADS, CHANNELS), *TURNS)),
    "turned back": (rotary._turned_back, (torch.randn(TOKENS, 1, SLOTS * HEADS, CHANNELS), *TURNS, SLOTS)),
}


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CALLS)
def test_compiled_equals_plain(name: str, compiler: str) -> None:
    function, arguments = CALLS[name]
    torch._dynamo.reset()
    compiled = torch.compile(inspect.unwrap(function), backend=compiler, fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        given = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(compiled(*given), function(*given), rtol=tolerance, atol=tolerance)
