"""Attention equals its formula and never holds S x S scores; the rotation equals Megatron's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jetmoe_megatron.model import attention_on_cpu
from jetmoe_megatron.model.attention import scaled_dot_product
from jetmoe_megatron.model.attention_on_cpu import causal_attention
from jetmoe_megatron.model.rotary import turn


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """softmax(q k^T / sqrt(C)) v, heads of a group side by side: [S, B, heads, C] -> [S, B, heads * C]."""
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], dim=2) for t in (k, v))
    scores = torch.einsum("sbhc,tbhc->bhst", q, k) / q.shape[-1] ** 0.5
    hidden = torch.ones(q.shape[0], q.shape[0], dtype=torch.bool).triu(1) if mask is None else mask
    return torch.einsum("bhst,tbhc->sbhc", scores.masked_fill(hidden, float("-inf")).softmax(-1), v).flatten(2)


def draw(length: int, batch: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(length, batch, n, 16, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads)]


def with_gradients(attend: Callable[..., torch.Tensor], inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    inputs = [t.detach().requires_grad_() for t in inputs]
    a = attend(*inputs, None)
    a.backward(torch.randn(a.shape, generator=torch.Generator().manual_seed(1)).to(a.dtype))
    return [a.detach(), *(t.grad for t in inputs if t.grad is not None)]


@pytest.fixture
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of causal attention, whatever this CPU would choose."""
    monkeypatch.setattr("jetmoe_megatron.model.attention.is_faster", lambda length, dtype: request.param == "blocks")
    return request.param


@pytest.mark.parametrize(
    ("amx", "dtype", "longest"),
    [
        (True, torch.float32, 0),
        (True, torch.bfloat16, 128),
        (False, torch.float32, 1024),
        (False, torch.bfloat16, 2048),
    ],
)
def test_which_is_faster_depends_on_the_cpu_the_precision_and_the_length(
    monkeypatch: pytest.MonkeyPatch, amx: bool, dtype: torch.dtype, longest: int
) -> None:
    monkeypatch.setattr(attention_on_cpu, "has_amx", lambda: amx)
    for length in (longest, longest + 1):
        called: list[tuple[torch.Tensor, ...]] = []
        monkeypatch.setattr("jetmoe_megatron.model.attention.causal_attention", lambda *t, to=called: to.append(t))
        if length:
            q, k, v = draw(length, 1, 2, 1, dtype)
            scaled_dot_product(q, k, v, None)
            assert len(called) == (length == longest)


def test_a_document_mask_goes_to_torchs_fused_kernel() -> None:
    length = 64
    q, k, v = draw(length, batch=2, heads=6, kv_heads=3)
    document = torch.arange(length) // 20
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask = (later | (document[:, None] != document))[None, None]
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        a = scaled_dot_product(q, k, v, mask)
    called = {event.key for event in profiled.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in called
    assert not called & {"aten::bmm", "aten::softmax", "aten::repeat_interleave"}
    torch.testing.assert_close(a, plain(q, k, v, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 16, 40, 45])  # blocks of 16: less than one, one, an uneven last one
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (6, 3), (6, 2), (4, 1)])
@pytest.mark.parametrize(
    ("way", "scores"), [("blocks", 1), ("blocks", 4000), ("blocks", 2**22), ("torch", 0)], indirect=["way"]
)  # heads at work at a time: one, some, all
def test_causal_attention_on_a_cpu_equals_the_formula(
    monkeypatch: pytest.MonkeyPatch, way: str, length: int, heads: int, kv_heads: int, scores: int
) -> None:
    monkeypatch.setattr(attention_on_cpu, "_QUERIES", 16)
    monkeypatch.setattr(attention_on_cpu, "_SCORES", scores)
    inputs = draw(length, 2, heads, kv_heads)
    ours, formula = (with_gradients(f, inputs) for f in (scaled_dot_product, plain))
    for own, expected in zip(ours, formula, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)


def test_in_bf16_it_is_as_near_to_the_formula_as_torchs_kernel() -> None:
    def torchs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: None) -> torch.Tensor:
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        a = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return a.permute(2, 0, 1, 3).flatten(2)

    def blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: None) -> torch.Tensor:
        return causal_attention(q, k, v)

    inputs = draw(300, 2, 4, 2, torch.bfloat16)
    exact = with_gradients(plain, [t.double() for t in inputs])
    ours, reference = ([t.double() for t in with_gradients(f, inputs)] for f in (blocks, torchs))
    for own, its, right in zip(ours, reference, exact, strict=True):
        assert (own - right).norm() < 1.2 * (its - right).norm()


@pytest.mark.parametrize("way", ["blocks"], indirect=True)
def test_no_more_than_a_few_heads_blocks_are_held(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_on_cpu, "_SCORES", 2 * 128 * 2 * 1024)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            largest = max(largest, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)), 0)
            return result

    inputs = draw(1024, 1, 8, 4)
    with Largest():
        with_gradients(scaled_dot_product, inputs)
    assert largest == 2 * 128 * 2 * 1024  # two key-value heads, 128 queries of both of their heads, all keys


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


def test_what_the_layer_would_ignore_is_refused() -> None:
    """Packed sequences, caches and biases: without an error, the result would be wrong."""
    from jetmoe_megatron.model.attention import MixtureOfAttention

    layer: Any = None
    for name in ("packed_seq_params", "inference_context", "attention_bias"):
        given: dict[str, Any] = {name: object(), "rotary_pos_cos": None}
        with pytest.raises(TypeError, match=f"MoA attention takes no {name}$"):
            MixtureOfAttention.forward(layer, torch.zeros(1), attention_mask=None, **given)
