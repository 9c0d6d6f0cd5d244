"""The auxiliary losses equal their formulas, written out again, in value and in the gradient of the router."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.test_parity import build


def formulas(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Equations 10 and 11 of arXiv 2404.07413, with f over the T * k assignments."""
    tokens, experts = logits_TE.shape
    chosen = logits_TE.topk(top_k, dim=-1).indices
    frequency = torch.zeros(experts)
    for row in chosen:
        for expert in row:
            frequency[expert] += 1 / (tokens * top_k)
    probability = (logits_TE.exp() / logits_TE.exp().sum(-1, keepdim=True)).mean(0)
    balance = experts * sum(f * p for f, p in zip(frequency, probability, strict=True))
    z = (logits_TE.exp().sum(-1).log() ** 2).mean()
    return balance, z


@pytest.fixture
def router(data: dict, world_of_one: None) -> Any:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    _, model = build({"num_experts": 6, "top_k": 2}, data)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    return model.decoder.layers[0].mlp.router.train()


def run_router(router: Any, x: Tensor) -> Tensor:
    router.record.reset()
    router.zero_grad()
    gates, chosen = router(x)
    assert (gates.sum(-1) - 1).abs().max() < 1e-6
    assert (chosen.sum(-1) == 2).all()
    return gates


def test_values(router: Any) -> None:
    x = torch.randn(16, 3, 32)
    run_router(router, x)
    balance, z = formulas(x.flatten(0, 1) @ router.weight.T, 2)
    torch.testing.assert_close(router.record.balance_loss, balance.detach())
    torch.testing.assert_close(router.record.z_loss, z.detach())
    assert router.record.micro_batches == 1


def test_what_is_recorded(router: Any) -> None:
    """Twice as much for two micro-batches."""
    x = torch.randn(16, 3, 32)
    probability_TE = (x.flatten(0, 1) @ router.weight.T).double().softmax(-1)
    load, entropy, margin = [0] * 6, 0.0, 0.0
    for row in probability_TE.tolist():
        by_size = sorted(range(6), key=lambda expert: -row[expert])
        for expert in by_size[:2]:
            load[expert] += 2
        entropy -= 2 * sum(p * math.log(p) for p in row)
        margin += 2 * (row[by_size[0]] - row[by_size[1]])
    run_router(router, x)
    router(x)
    assert router.record.load_E.tolist() == load
    assert float(router.record.gate_entropy) == pytest.approx(entropy, rel=1e-5)
    assert float(router.record.top1_margin) == pytest.approx(margin, rel=1e-5)


@pytest.mark.parametrize("coefficients", [(0.01, 0.0), (0.0, 0.001), (0.3, 0.2)])
def test_gradient_on_router_weights(router: Any, coefficients: tuple[float, float]) -> None:
    router.config.moe_aux_loss_coeff, router.config.moe_z_loss_coeff = coefficients
    x = torch.randn(16, 3, 32)
    (run_router(router, x) * 0).sum().backward()  # no language loss: what is left are the auxiliary ones
    weight = router.weight.detach().clone().requires_grad_()
    balance, z = formulas(x.flatten(0, 1) @ weight.T, 2)
    (coefficients[0] * balance + coefficients[1] * z).backward()
    torch.testing.assert_close(router.weight.grad, weight.grad, rtol=1e-5, atol=1e-7)


def test_even_router_has_balance_1(router: Any) -> None:
    with torch.no_grad():
        router.weight.zero_()
    run_router(router, torch.randn(8, 2, 32))
    assert float(router.record.balance_loss) == pytest.approx(1.0)


def test_z_loss_survives_huge_logits(router: Any) -> None:
    with torch.no_grad():
        router.weight.fill_(1e3)
    gates = run_router(router, torch.full((4, 1, 32), 1e2))
    gates.sum().backward()
    assert torch.isfinite(router.record.z_loss)
    assert torch.isfinite(router.weight.grad).all()


def test_nothing_is_counted_outside_of_training(router: Any) -> None:
    router.record.reset()
    router.eval()
    router(torch.randn(4, 1, 32))
    router.train()
    with torch.no_grad():  # the first pass of a recomputed layer
        router(torch.randn(4, 1, 32))
    assert router.record.micro_batches == 0


def test_counts_of_a_step_are_exact_in_bf16(router: Any) -> None:
    """Megatron casts the model, which 257 in bf16 would not survive."""
    router.bfloat16()
    router.counting = True
    with torch.no_grad():
        for _ in range(40):
            router(torch.randn(32, 1, 32, dtype=torch.bfloat16))
    assert int(router.count_E.sum()) == 40 * 32 * 2


def test_logits_in_fp32_without_an_fp32_copy_of_the_input(router: Any) -> None:
    x = torch.randn(16, 3, 32, dtype=torch.bfloat16).requires_grad_()
    router.weight.data = router.weight.data.bfloat16()
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        logits = router.gating(x)
    assert logits.dtype == torch.float32
    assert {t.dtype for t in kept} == {torch.bfloat16}
    g = torch.randn_like(logits)
    logits.backward(g)
    plain, weight = (t.detach().float().requires_grad_() for t in (x, router.weight))
    expected = torch.nn.functional.linear(plain, weight)
    expected.backward(g)
    assert torch.equal(logits, expected)
    for ours, truth in ((x.grad, plain.grad), (router.weight.grad, weight.grad)):
        assert truth is not None
        torch.testing.assert_close(ours, truth.bfloat16(), rtol=1e-2, atol=1e-6)
