"""Floating-point operations of a training step, counted in matmuls: the formulas behind every MFU."""

from __future__ import annotations

from dataclasses import dataclass

from jetmoe_megatron.config.describe import count_parameters
from jetmoe_megatron.config.schema import Model

FORMULA = (
    "6N: 6 x active weights x tokens (2 forward, 4 backward; the tied embedding once).\n"
    "with attention: 6N + 6 x layers x sequence x heads x channels x tokens, where heads = top_k x num_kv_heads: two\n"
    "matmuls over half of the sequence, as the mask is causal, three times. Recomputation is not counted."
)
# Dense bf16 without sparsity, from NVIDIA's data sheets of the H100 SXM, the H200 and the A100.
PEAK_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}


@dataclass(frozen=True)
class Flops:
    weights_only: float
    with_attention: float


def step_flops(model: Model, sequence_length: int, tokens: int) -> Flops:
    """Of a forward and backward pass over `tokens` tokens."""
    _, active = count_parameters(model)
    heads = model.top_k * model.num_kv_heads
    attention = 6 * model.num_layers * sequence_length * heads * model.kv_channels * tokens
    return Flops(6 * active * tokens, 6 * active * tokens + attention)


def peak_tflops(device_name: str) -> float | None:
    return next((peak for name, peak in PEAK_TFLOPS.items() if name in device_name), None)
