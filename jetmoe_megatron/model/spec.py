"""JetMoE as a Megatron-Core layer spec: its two sparse modules inside Megatron's TransformerLayer."""

from __future__ import annotations

import logging

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer import ModuleSpec, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from jetmoe_megatron.model.attention import AttentionSubmodules, MixtureOfAttention
from jetmoe_megatron.model.experts.glu import GLUExperts
from jetmoe_megatron.model.mlp import MixtureOfMLPs
from jetmoe_megatron.model.norm import FinalRMSNorm, RMSNorm
from jetmoe_megatron.model.router import AttentionRouter, MLPRouter


def layer_spec() -> ModuleSpec:
    """x + attention(norm(x)), then x + mlp(norm(x)). Norms are separate: router and experts both read their output."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=MixtureOfAttention, submodules=AttentionSubmodules(router=AttentionRouter)
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MixtureOfMLPs, submodules=MoESubmodules(experts=GLUExperts, router=MLPRouter)),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def block_spec(num_layers: int) -> TransformerBlockSubmodules:
    """The layers of one pipeline stage and the final norm, which only the last stage builds."""
    # Megatron-Core 0.16 warns, once per layer, that it does not know MixtureOfMLPs (transformer_layer.py,
    # `TransformerLayer`).
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    return TransformerBlockSubmodules(layer_specs=[layer_spec()] * num_layers, layer_norm=FinalRMSNorm)
