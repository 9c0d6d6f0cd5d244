"""Compares a backend of the expert matmuls with the loop, for every kind of routing. Needs no process group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from jetmoe_megatron.model.experts import Backend, open_backend
from jetmoe_megatron.model.experts.swiglu import swiglu
from jetmoe_megatron.model.token_dispatcher import Dispatch

EXPERTS, HIDDEN, FFN = 6, 32, 48
ROUTINGS = ("uneven", "even", "one")  # uneven: most rows to the first experts, none to the last two
CASES = [(routing, top_k) for routing in ROUTINGS for top_k in (1, 2, 3)]
# Largest difference, relative to the largest value, of any output or gradient.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass
class Layer:
    x_TD: Tensor
    gate_TK: Tensor
    w_E2FD: Tensor
    v_EDF: Tensor
    q_EDD: Tensor


def choices(routing: str, tokens: int, top_k: int) -> Tensor:
    """The chosen experts [T, K]: different ones for each token."""
    if routing == "even":
        return (torch.arange(tokens)[:, None] + torch.arange(top_k)) % EXPERTS
    if routing == "one":  # all tokens to the same
        return (torch.arange(top_k) + 2).expand(tokens, top_k).contiguous()
    chances = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0, 0.0]).expand(tokens, EXPERTS)
    return torch.multinomial(chances, top_k, generator=torch.Generator().manual_seed(top_k))


def layer(top_k: int, tokens: int, dtype: torch.dtype, device: str) -> Layer:
    random = torch.Generator().manual_seed(7)

    def draw(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=random).to(device, kind).requires_grad_()

    gate = draw(tokens, top_k, kind=torch.float32)
    weights = (draw(EXPERTS, 2 * FFN, HIDDEN), draw(EXPERTS, HIDDEN, FFN), draw(EXPERTS, HIDDEN, HIDDEN))
    return Layer(draw(tokens, HIDDEN), gate, *weights)


def run(name_or_backend: str | Backend, layer: Layer, expert_TK: Tensor) -> dict[str, Tensor]:
    """What both kinds of layers do: rows through an MLP; rows out to slots, as queries, and back. With gradients."""
    chosen = open_backend(name_or_backend) if isinstance(name_or_backend, str) else name_or_backend
    for tensor in vars(layer).values():
        tensor.grad = None
    plan = Dispatch(expert_TK.to(layer.x_TD.device), EXPERTS, None, chosen)
    rows = plan.rows_of_tokens(layer.x_TD)
    mlp = chosen.linear(swiglu(chosen.linear(rows, layer.w_E2FD, plan.count_L)), layer.v_EDF, plan.count_L)
    slots_TKD = plan.slots_of_rows(chosen.linear(rows, layer.q_EDD, plan.count_L))
    position_TKD = torch.linspace(0.5, 1.5, slots_TKD.numel(), device=slots_TKD.device).view(slots_TKD.shape)
    attention = plan.rows_of_slots(slots_TKD * position_TKD.to(slots_TKD.dtype))
    y_TD = plan.tokens_of_rows(mlp + attention, layer.gate_TK)
    weight_TD = torch.linspace(-1, 1, y_TD.numel(), device=y_TD.device).view(y_TD.shape)
    (y_TD.float() * weight_TD).sum().backward()
    gradients = {f"gradient of {name}": tensor.grad for name, tensor in vars(layer).items()}
    return {"output": y_TD.detach(), **gradients}


def differences(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> Iterator[tuple[str, float]]:
    for name, expected in truth.items():
        scale = expected.float().abs().max().item()
        yield name, (ours[name].float() - expected.float()).abs().max().item() / scale


def check(
    name_or_backend: str | Backend, dtype: torch.dtype, device: str, tokens: int = 40, tolerance: float | None = None
) -> None:
    """Raises AssertionError that names the routing and the tensor that differs from the loop's."""
    for routing, top_k in CASES:
        inputs, expert_TK = layer(top_k, tokens, dtype, device), choices(routing, tokens, top_k)
        ours, truth = run(name_or_backend, inputs, expert_TK), run("loop", inputs, expert_TK)
        for name, error in differences(ours, truth):
            assert error < (tolerance or TOLERANCE[dtype]), f"{routing}, top {top_k}: {name} differs by {error:.1e}"
