"""The line that says which kernel computes the attention of a run. It asks torch once, at the start."""

from __future__ import annotations

import torch

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model.attention import kernel_of
from jetmoe_megatron.model.config import DTYPE
from jetmoe_megatron.runtime.device import device
from jetmoe_megatron.runtime.machine import CUDNN_FOR_HOPPER

_NAMES = {
    "causal_attention": "ours for a CPU",  # model/attention_on_cpu.py
    "FLASH_ATTENTION": "torch's flash kernel",
    "CUDNN_ATTENTION": "cuDNN's kernel",
    "EFFICIENT_ATTENTION": "torch's memory-efficient kernel",
    "MATH": "torch's unfused kernel",
}


def attention_kernel(run: Run, layout: Layout) -> str:
    """Letters as in `attention.py`."""
    if layout.context > 1:
        return "Transformer Engine's ring exchange"
    sequence, batch, heads = run.batch.sequence_length, run.batch.micro_sequences, run.model.num_kv_heads
    dtype = DTYPE[run.precision]
    local = heads // layout.tensor
    q_SBGC, k_SBNC = (
        torch.empty(sequence, batch, number, run.model.kv_channels, dtype=dtype, device=device(), requires_grad=True)
        for number in (local * run.model.top_k, local)
    )
    masked = run.data.mask_attention
    mask = torch.ones(batch, 1, sequence, sequence, dtype=torch.bool, device=device()) if masked else None
    name = kernel_of(q_SBGC, k_SBNC, mask)
    return _NAMES[name] + (_slower_than_cudnn() if name == "FLASH_ATTENTION" and q_SBGC.is_cuda else "")


def _slower_than_cudnn() -> str:
    version = torch.backends.cudnn.version() or 0
    if torch.cuda.get_device_capability()[0] != 9 or version >= CUDNN_FOR_HOPPER:
        return ""
    return f" (cuDNN {version} is below {CUDNN_FOR_HOPPER}, where torch takes cuDNN's faster one on this GPU)"
