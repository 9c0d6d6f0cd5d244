"""Causal attention on a CPU: matmuls over blocks of queries, and the lengths for which they beat torch's kernel.

A block of queries sees all its keys at once, so nothing is carried from block to block. Scores are in fp32, and are
computed again for the gradients (Dao et al., arXiv 2205.14135, algorithm 4, with blocks of queries only).

Letters: S sequence, B micro-batch, N key-value heads, K query heads of each, H = N * K, C channels; G = B * N and
R = S * K, because to a matmul the K heads are only more rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from jetmoe_megatron.runtime.matmul import has_amx

_QUERIES = 128  # positions in a block
_SCORES = 2**22  # held at a time: 16 MB
# The longest sequences for which ours is faster, from docs/performance.md. A run does not measure this, so that a
# resumed run on the same kind of CPU computes the same numbers.
_LONGEST = {
    "AMX": {torch.float32: 0, torch.bfloat16: 128},
    "other": {torch.float32: 1024, torch.bfloat16: 2048},
}


def is_faster(length: int, dtype: torch.dtype) -> bool:
    """Whether `causal_attention` is faster than torch's kernel on this CPU, for sequences of `length` tokens."""
    return length <= _LONGEST["AMX" if has_amx() else "other"][dtype]


def causal_attention(q_SBHC: Tensor, k_SBNC: Tensor, v_SBNC: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(C)) v over the keys up to each query's own position: -> [S, B, H * C]."""
    length, batch, kv_heads, _ = k_SBNC.shape
    q_GRC = q_SBHC.unflatten(2, (kv_heads, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3).flatten(0, 1)
    k_GSC, v_GSC = (t.permute(1, 2, 0, 3).flatten(0, 1) for t in (k_SBNC, v_SBNC))
    o_GRC = _CausalAttention.apply(q_GRC, k_GSC, v_GSC)
    return o_GRC.unflatten(1, (length, -1)).unflatten(0, (batch, kv_heads)).permute(2, 0, 1, 3, 4).flatten(2)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_GRC: Tensor, k_GSC: Tensor, v_GSC: Tensor) -> Tensor:
        ctx.save_for_backward(q_GRC, k_GSC, v_GSC)
        o_GRC = torch.empty_like(q_GRC)
        slots = q_GRC.shape[1] // k_GSC.shape[1]
        for rows, keys in _blocks(q_GRC, k_GSC):
            p = _probabilities(q_GRC[rows], k_GSC[keys].contiguous(), slots)
            o_GRC[rows] = p.to(v_GSC.dtype) @ v_GSC[keys]
        return o_GRC

    @staticmethod
    def backward(ctx: Any, g_GRC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_GRC, k_GSC, v_GSC = ctx.saved_tensors
        dtype, scale, slots = q_GRC.dtype, q_GRC.shape[2] ** -0.5, q_GRC.shape[1] // k_GSC.shape[1]
        dq_GRC = torch.empty_like(q_GRC)
        dk_GSC, dv_GSC = (torch.zeros_like(t, dtype=torch.float32) for t in (k_GSC, v_GSC))
        for rows, keys in _blocks(q_GRC, k_GSC):
            # Contiguous copies: without them, each matmul copies its operands, more slowly.
            q, g = q_GRC[rows].contiguous(), g_GRC[rows].contiguous()
            k, v = k_GSC[keys].contiguous(), v_GSC[keys].contiguous()
            p = _probabilities(q, k, slots)
            dv_GSC[keys] += p.to(dtype).mT @ g
            dp = g.float() @ v.float().mT
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, torch.float32).mul_(scale).to(dtype)
            dk_GSC[keys] += ds.mT @ q
            dq_GRC[rows] = ds @ k
        return dq_GRC, dk_GSC.to(dtype), dv_GSC.to(dtype)


def _blocks(q_GRC: Tensor, k_GSC: Tensor) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """(heads, queries) of each block and (the same heads, all keys that the last of the queries sees)."""
    heads, length = k_GSC.shape[:2]
    slots = q_GRC.shape[1] // length
    at_once = max(1, _SCORES // (_QUERIES * slots * length))
    for head in range(0, heads, at_once):
        those = slice(head, head + at_once)
        for start in range(0, length, _QUERIES):
            end = min(start + _QUERIES, length)
            yield (those, slice(start * slots, end * slots)), (those, slice(end))


def _probabilities(q: Tensor, k: Tensor, slots: int) -> Tensor:
    """Of queries [heads, queries * slots, C] over keys [heads, keys, C]. The queries have the last keys' positions."""
    scores = (q.float() * q.shape[2] ** -0.5) @ k.float().mT
    queries = q.shape[1] // slots
    later = torch.full((queries, queries), float("-inf")).triu(1).repeat_interleave(slots, 0)
    scores[:, :, -queries:] += later
    return scores.softmax(-1)
