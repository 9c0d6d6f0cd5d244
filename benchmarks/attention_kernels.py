"""Attention of one layer, forward and backward, through each available kernel."""

from __future__ import annotations

import importlib.util

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.contestants import Step
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model.attention import scaled_dot_product
from jetmoe_megatron.model.attention_on_cpu import causal_attention
from jetmoe_megatron.runtime.device import device

KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
OURS = "ours"  # what the layer calls
BLOCKS = "blocks"  # what it may call on a CPU
TRANSFORMER_ENGINE = "Transformer Engine"


def kernel_names() -> list[str]:
    if not torch.cuda.is_available():
        return [OURS, "flash"]
    has_te = importlib.util.find_spec("transformer_engine") is not None
    return [OURS, *KERNELS, *([TRANSFORMER_ENGINE] if has_te else [])]


def attention_step(name: str, run: Run) -> Step:
    """Causal, with `top_k` query heads for each key-value head, in the layout of the layer [S, B, heads, C]."""
    model, length, batch = run.model, run.batch.sequence_length, run.batch.micro_sequences
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(length, batch, heads, model.kv_channels, dtype=dtype, device=device()).requires_grad_()

    heads = model.num_kv_heads * model.top_k
    q, k, v = draw(heads), draw(model.num_kv_heads), draw(model.num_kv_heads)
    g = torch.randn_like(q)
    if name == OURS:
        return lambda: scaled_dot_product(q, k, v, None).backward(g.flatten(2))
    if name == BLOCKS:
        return lambda: causal_attention(q, k, v).backward(g.flatten(2))
    if name == TRANSFORMER_ENGINE:
        import transformer_engine.pytorch as te

        attend = te.DotProductAttention(
            heads, model.kv_channels, num_gqa_groups=model.num_kv_heads, attn_mask_type="causal", qkv_format="sbhd"
        )
        return lambda: attend(q, k, v).backward(g.flatten(2))

    def step() -> None:
        with sdpa_kernel(KERNELS[name]):
            query, key, value = (t.permute(1, 2, 0, 3) for t in (q, k, v))
            a = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        a.permute(2, 0, 1, 3).backward(g)

    return step
