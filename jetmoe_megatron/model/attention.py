"""The mixture of attention heads (arXiv 2404.07413, section 2.3), instead of Megatron's self-attention.

Each expert has its own query and output projections; all experts share the keys and values. The K experts chosen for a
token give it K groups of query heads. Head h of every group attends to key-value head h:

    q_j = W_q[e_j] u            o = sum_j gate_j * W_o[e_j] a_j + bias
    k, v = W_kv u               a_j = softmax(rope(q_j) rope(k)^T / sqrt(d)) v

A grouped-query kernel needs the query heads in the order [kv head, slot]; tokens carry them as [slot, kv head]. Hence
the two transposes. The first is part of the rotation.

Tensor parallelism splits the heads, and with them the rows of every W_q and the columns of every W_o.

Letters: S sequence, B micro-batch, H hidden, T = S * B tokens, E experts, K top-k, N local kv heads, C channels,
A = N * C; G = N * K query heads, D = G * C, X = 2 * A.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from jetmoe_megatron.model.attention_on_cpu import causal_attention, is_faster
from jetmoe_megatron.model.config import JetMoEConfig
from jetmoe_megatron.model.experts.sharded_weights import ExpertLinear
from jetmoe_megatron.model.mlp import output_bias
from jetmoe_megatron.model.rotary import turn
from jetmoe_megatron.model.token_dispatcher import Dispatch


@dataclass
class AttentionSubmodules:
    router: type


class MixtureOfAttention(MegatronModule):
    """[S, B, H] -> [S, B, H] and the output bias [H]."""

    def __init__(
        self,
        config: JetMoEConfig,
        submodules: AttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,  # newer versions of Megatron-Core give each module its name
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.channels = config.kv_channels
        self.local_kv_heads = config.num_query_groups // self.tp_group.size()
        experts, hidden = config.num_moe_experts, config.hidden_size
        width = config.num_query_groups * config.kv_channels
        moe_groups = get_default_pg_collection()
        # Sharded attention experts cost four exchanges of rows per layer, MLP experts two (docs/parallelism.md).
        self.expert_group = moe_groups.ep if config.shard_attention_experts and moe_groups.ep.size() > 1 else None
        groups: dict[str, Any] = {
            "expert_group": self.expert_group,
            "tensor_group": pg_collection.tp,
            "replica_group": moe_groups.expt_dp if self.expert_group else pg_collection.dp_cp,
            "delay_gradient": config.delay_wgrad_compute,
        }
        self.router = submodules.router(config=config, pg_collection=moe_groups)
        self.router.set_layer_number(layer_number)
        self.linear_q = ExpertLinear(config, (experts, width, hidden), tensor_axis=1, **groups)
        self.linear_out = ExpertLinear(config, (experts, hidden, width), tensor_axis=2, **groups)
        # Rows are ordered [kv head, key or value, channel], so a contiguous slice of rows is a slice of heads.
        self.linear_kv = ColumnParallelLinear(
            hidden,
            2 * width,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            disable_grad_reduce=True,
            tp_group=pg_collection.tp,
        )
        # It gets the whole sequence; the gather's backward pass sums the input gradients of all tensor ranks.
        self.linear_kv.sequence_parallel = False
        self.bias = output_bias(config)
        self.core_attention = _core_attention(config, layer_number, pg_collection)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Any = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states: normed input [S / tp, B, H].
            attention_mask: bool, true where a query may not see a key [B, 1, S, S]; None: causal.
            rotary_pos_emb: angles [S, 1 or B, 1, C].
            others: what else Megatron's layer passes (transformer_layer.py, `_forward_attention`). All must be None.
        """
        if given := [name for name, value in others.items() if value is not None]:
            raise TypeError(f"MoA attention takes no {', '.join(given)}")
        gates_TE, _ = self.router(hidden_states)
        if self.config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, group=self.tp_group)
            gates_TE = gather_from_sequence_parallel_region(gates_TE, group=self.tp_group)
        gates_TK, expert_TK = gates_TE.topk(self.router.topk, dim=-1)
        dispatch = Dispatch(expert_TK, self.config.num_moe_experts, self.expert_group, self.linear_q.backend)

        u_TH = hidden_states.flatten(0, 1)
        q_TKA = dispatch.slots_of_rows(self.linear_q(dispatch.rows_of_tokens(u_TH), dispatch.count_L))
        kv_SBX, _ = self.linear_kv(hidden_states)
        a_TKA = self._attend(q_TKA, kv_SBX, rotary_pos_emb, attention_mask)

        y_TH = dispatch.tokens_of_rows(self.linear_out(dispatch.rows_of_slots(a_TKA), dispatch.count_L), gates_TK)
        output = y_TH.unflatten(0, hidden_states.shape[:2])
        if self.config.sequence_parallel:
            output = reduce_scatter_to_sequence_parallel_region(output, group=self.tp_group)
        return output, self.bias

    def backward_dw(self) -> None:
        """Megatron's hook for delayed weight gradients. Those of keys and values are computed in the backward pass."""
        self.linear_out.backward_dw()
        self.linear_q.backward_dw()

    def _attend(self, q_TKA: Tensor, kv_SBX: Tensor, angles: Tensor, mask: Tensor | None) -> Tensor:
        """Queries [T, K, A] over keys and values [S, B, 2 * A] -> [T, K, A]."""
        sequence, batch = kv_SBX.shape[:2]
        slots, heads, channels = q_TKA.shape[1], self.local_kv_heads, self.channels
        k_SBNC, v_SBNC = kv_SBX.view(sequence, batch, heads, 2, channels).unbind(3)
        q_SBGC = turn(q_TKA.view(sequence, batch, slots, heads, channels), angles)
        k_SBNC = turn(k_SBNC.unsqueeze(2), angles)
        a_SBD = self.core_attention(q_SBGC, k_SBNC, v_SBNC, mask)
        a_SBKNC = a_SBD.view(sequence, batch, heads, slots, channels).transpose(2, 3)
        return a_SBKNC.reshape(sequence * batch, slots, heads * channels)


# The kernel that holds S x S scores is left out: a shape that none of these supports is an error, not a slow run.
GPU_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
CoreAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def _core_attention(config: JetMoEConfig, layer_number: int, groups: ProcessGroupCollection) -> CoreAttention:
    """Attention of queries [S, B, G, C] over keys and values [S, B, N, C], with a mask or None -> [S, B, D].

    With context parallelism, it is Transformer Engine's ring exchange, causal only.
    """
    if config.context_parallel_size == 1:
        return scaled_dot_product
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    ring = TEDotProductAttention(config, layer_number, AttnMaskType.causal, "self", pg_collection=groups)
    return lambda q, k, v, _: ring(q, k, v, None, AttnMaskType.causal)


def scaled_dot_product(q_SBGC: Tensor, k_SBNC: Tensor, v_SBNC: Tensor, mask: Tensor | None) -> Tensor:
    """Attention by a fused kernel, which never holds S x S scores: torch's, or ours where it is faster (CPU, causal).

    On a GPU, the flash kernel and cuDNN's, which torch prefers on Hopper, let groups of heads share keys and values
    without a copy. Flash takes no mask, and neither takes fp32. The kernel that takes both needs keys and values
    repeated for each query head (torch/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
    """
    if _is_ours(q_SBGC, mask):
        return causal_attention(q_SBGC, k_SBNC, v_SBNC)
    q, k, v = _as_torch_has_them(mask, q_SBGC, k_SBNC, v_SBNC)
    with _fused_only(q):
        a = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=None if mask is None else ~mask, is_causal=mask is None, enable_gqa=True
        )
    return a.permute(2, 0, 1, 3).flatten(2)


def kernel_of(q_SBGC: Tensor, k_SBNC: Tensor, mask: Tensor | None) -> str:
    """The name of the kernel that `scaled_dot_product` takes for tensors like these."""
    if _is_ours(q_SBGC, mask):
        return "causal_attention"
    q, k, v = _as_torch_has_them(mask, q_SBGC, k_SBNC, k_SBNC)
    with _fused_only(q):
        choice = torch._fused_sdp_choice(q, k, v, mask, is_causal=mask is None, enable_gqa=True)
    return str(SDPBackend(choice).name)


def _is_ours(q_SBGC: Tensor, mask: Tensor | None) -> bool:
    return mask is None and not q_SBGC.is_cuda and is_faster(q_SBGC.shape[0], q_SBGC.dtype)


def _as_torch_has_them(mask: Tensor | None, *qkv_SBNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B, heads, S, C]"""
    q, k, v = (t.permute(1, 2, 0, 3) for t in qkv_SBNC)
    if q.is_cuda and (mask is not None or q.dtype == torch.float32):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return q, k, v


def _fused_only(q: Tensor) -> contextlib.AbstractContextManager[None]:
    return sdpa_kernel(GPU_KERNELS) if q.is_cuda else contextlib.nullcontext()
