"""On a GPU too, every form of attention uses a fused kernel: no S x S scores, and the values of the formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from jetmoe_megatron.model.attention import scaled_dot_product
from tests.model.test_attention import plain

MIB = 2**20


def heads(length: int, number: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(length, 1, number, 64, dtype=dtype, device="cuda", requires_grad=True)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_kernel(masked: bool, dtype: torch.dtype) -> None:
    length = 4096
    q, k, v = heads(length, 32, dtype), heads(length, 16, dtype), heads(length, 16, dtype)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device="cuda").triu(1) if masked else None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        a = scaled_dot_product(q, k, v, mask)
        a.backward(torch.randn_like(a))
        torch.cuda.synchronize()
    kernels = " ".join(event.key for event in profiled.key_averages()).lower()
    assert any(name in kernels for name in ("flash", "fmha", "sdpa")), kernels
    assert "softmax_warp" not in kernels
    scores = length * length * 32 * q.element_size()
    assert torch.cuda.max_memory_allocated() - before < scores / 2, f"{scores / MIB:.0f} MiB of scores are held"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_values_and_gradients(masked: bool, dtype: torch.dtype, tolerance: float) -> None:
    """Heads as wide and as many to a group as JetMoE-8B's, laid out as the layer has them: views, not copies."""
    length, document = 320, torch.arange(320) // 100
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    mask = (later | (document[:, None] != document))[None, None] if masked else None
    on_gpu = [torch.randn(length, 2, n, 128, dtype=dtype, device="cuda").requires_grad_() for n in (8, 4, 4)]
    on_cpu = [t.detach().cpu().float().requires_grad_() for t in on_gpu]
    q, k, v = on_gpu
    a = scaled_dot_product(q, k, v, None if mask is None else mask.cuda())
    q, k, v = on_cpu
    expected = plain(q, k, v, mask)
    g = torch.randn_like(a)
    a.backward(g)
    expected.backward(g.cpu().float())
    pairs: list[tuple[Any, Any]] = [(a, expected), *((x.grad, y.grad) for x, y in zip(on_gpu, on_cpu, strict=True))]
    for ours, truth in pairs:
        error = (ours.detach().cpu().float() - truth).abs().max() / truth.abs().max()
        assert error < tolerance, error
