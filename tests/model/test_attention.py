"""Attention goes through a fused kernel that never holds S x S scores, and the rotation equals Megatron's."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from jetmoe_megatron.model.attention import _scaled_dot_product
from jetmoe_megatron.model.rotary import turn


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k^T / sqrt(C)) v, heads of a group side by side: [S, B, heads, C] -> [S, B, heads * C]."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("sbhc,tbhc->bhst", q, k) / q.shape[-1] ** 0.5
    hidden = torch.ones(q.shape[0], q.shape[0], dtype=torch.bool).triu(1) if mask is None else mask
    return torch.einsum("bhst,tbhc->sbhc", scores.masked_fill(hidden, float("-inf")).softmax(-1), v).flatten(2)


@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula_without_holding_scores(masked: bool) -> None:
    length = 64
    q, k, v = torch.randn(length, 2, 6, 16), torch.randn(length, 2, 3, 16), torch.randn(length, 2, 3, 16)
    document = torch.arange(length) // 20
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask = (later | (document[:, None] != document))[None, None] if masked else None
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        a = _scaled_dot_product(q, k, v, mask)
    called = {event.key for event in profiled.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in called
    assert not called & {"aten::bmm", "aten::softmax", "aten::repeat_interleave"}
    torch.testing.assert_close(a, plain(q, k, v, mask), rtol=1e-5, atol=1e-5)


def test_rotation_equals_megatrons() -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    length, batch, slots, heads, channels = 7, 2, 3, 4, 8
    half = torch.arange(length)[:, None] * 0.5 ** torch.arange(channels // 2)
    angles = torch.cat([half, half], dim=-1)[:, None, None]
    x = torch.randn(length, batch, slots, heads, channels, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    expected = _apply_rotary_pos_emb_bshd(twin.transpose(2, 3).flatten(2, 3), angles)
    y = turn(x, angles)
    torch.testing.assert_close(y, expected)
    g = torch.randn_like(y)
    y.backward(g)
    expected.backward(g)
    torch.testing.assert_close(x.grad, twin.grad)
