"""The name and layout of each tensor of JetMoE on both sides: one table, which both directions read.

Only the keys and values differ in order. Hugging Face has all keys, then all values: rows [2, kv heads, channels].
Here each head has its keys and values together, rows [kv heads, 2, channels], so that a slice of rows is a slice of
heads. Here the MLP's activated and linear halves have a separate axis.

Letters: V vocabulary, H hidden, E experts, A = kv heads * channels, F ffn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
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
    dimensions: str  # of Hugging Face's tensor
    to_hf: Reshape = _same
    from_hf: Reshape = _same
    same_order: bool = True  # whether both sides store the values in the same order


EMBEDDING = Name("model.embed_tokens.weight", "embedding.word_embeddings.weight", "V H")
FINAL_NORM = Name("model.norm.weight", "decoder.final_layernorm.weight", "H")
# In the order of the released files (8B: 24 layers of these, and the two above). The names follow `model.layers.<i>.`
# there and `decoder.layers.` here, where a checkpoint stacks the layers of one name.
LAYER = (
    Name("input_layernorm.weight", "input_layernorm.weight", "H"),
    Name("self_attention.experts.bias", "self_attention.bias", "H"),
    Name("self_attention.experts.input_linear.weight", "self_attention.linear_q.weight", "E A H"),
    Name("self_attention.experts.output_linear.weight", "self_attention.linear_out.weight", "E H A"),
    Name("self_attention.experts.router.layer.weight", "self_attention.router.weight", "E H"),
    Name("self_attention.kv_proj.weight", "self_attention.linear_kv.weight", "2A H", _kv_to_hf, _kv_from_hf, False),
    Name("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "H"),
    Name("mlp.bias", "mlp.bias", "H"),
    Name("mlp.input_linear.weight", "mlp.experts.linear_in.weight", "E 2F H", _glu_to_hf, _glu_from_hf),
    Name("mlp.output_linear.weight", "mlp.experts.linear_out.weight", "E H F"),
    Name("mlp.router.layer.weight", "mlp.router.weight", "E H"),
)


@dataclass(frozen=True)
class Weight:
    """One tensor of one model, with its full name on both sides."""

    name: Name
    model: Model
    layer: int | None = None  # its place in the checkpoint's stack of layers

    @property
    def hugging_face(self) -> str:
        return self.name.hugging_face if self.layer is None else f"model.layers.{self.layer}.{self.name.hugging_face}"

    @property
    def megatron(self) -> str:
        return self.name.megatron if self.layer is None else f"decoder.layers.{self.name.megatron}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of Hugging Face's tensor."""
        model = self.model
        width = model.num_kv_heads * model.kv_channels
        size = {"V": model.vocab_size, "H": model.hidden_size, "E": model.num_experts, "A": width, "2A": 2 * width}
        size |= {"F": model.ffn_hidden_size, "2F": 2 * model.ffn_hidden_size}
        return tuple(size[letter] for letter in self.name.dimensions.split())

    @property
    def megatron_shape(self) -> tuple[int, ...]:
        """Of one layer here."""
        return tuple(self.from_hf(torch.empty(self.shape, device="meta")).shape)

    def to_hf(self, weight: Tensor) -> Tensor:
        return self.name.to_hf(weight, self.model)

    def from_hf(self, weight: Tensor) -> Tensor:
        return self.name.from_hf(weight, self.model)


def weights(model: Model) -> list[Weight]:
    """In the order of the released files."""
    layers = [Weight(name, model, i) for i in range(model.num_layers) for name in LAYER]
    return [Weight(EMBEDDING, model), *layers, Weight(FINAL_NORM, model)]
