"""How each tensor of a JetMoE layer is called and laid out on both sides.

Only the keys and values differ in layout. Hugging Face has all keys, then all values: rows [2, kv heads, channels].
Here each head has its keys and values together, rows [kv heads, 2, channels], so that a slice of rows is a slice of
heads. The MLP's activated and linear halves lie on an axis of their own here.

Letters: N kv heads, C channels, E experts, F ffn, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from jetmoe_megatron.config.schema import Model

Reshape = Callable[[Tensor, Model], Tensor]


def _same(weight: Tensor, model: Model) -> Tensor:
    return weight


def _kv_to_hf(weight: Tensor, model: Model) -> Tensor:
    return weight.unflatten(0, (model.num_kv_heads, 2, model.kv_channels)).transpose(0, 1).flatten(0, 2)


def _kv_from_hf(weight: Tensor, model: Model) -> Tensor:
    return weight.unflatten(0, (2, model.num_kv_heads, model.kv_channels)).transpose(0, 1).flatten(0, 2)


def _glu_to_hf(w_E2FH: Tensor, model: Model) -> Tensor:
    return w_E2FH.flatten(1, 2)


def _glu_from_hf(w_EFH: Tensor, model: Model) -> Tensor:
    return w_EFH.unflatten(1, (2, model.ffn_hidden_size))


@dataclass(frozen=True)
class Name:
    hugging_face: str
    megatron: str
    to_hf: Reshape = _same
    from_hf: Reshape = _same


EMBEDDING = Name("model.embed_tokens.weight", "embedding.word_embeddings.weight")
FINAL_NORM = Name("model.norm.weight", "decoder.final_layernorm.weight")
# In the order of the released files (8B: 24 of these, and the two above), below `model.layers.<i>.` there and
# `decoder.layers.` here, where a checkpoint stacks the layers of one name.
LAYER = (
    Name("input_layernorm.weight", "input_layernorm.weight"),
    Name("self_attention.experts.bias", "self_attention.bias"),
    Name("self_attention.experts.input_linear.weight", "self_attention.linear_q.weight"),
    Name("self_attention.experts.output_linear.weight", "self_attention.linear_out.weight"),
    Name("self_attention.experts.router.layer.weight", "self_attention.router.weight"),
    Name("self_attention.kv_proj.weight", "self_attention.linear_kv.weight", _kv_to_hf, _kv_from_hf),
    Name("post_attention_layernorm.weight", "pre_mlp_layernorm.weight"),
    Name("mlp.bias", "mlp.bias"),
    Name("mlp.input_linear.weight", "mlp.experts.linear_in.weight", _glu_to_hf, _glu_from_hf),
    Name("mlp.output_linear.weight", "mlp.experts.linear_out.weight"),
    Name("mlp.router.layer.weight", "mlp.router.weight"),
)
