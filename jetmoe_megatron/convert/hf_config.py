"""config.json of an exported model."""

from __future__ import annotations

from typing import Any

from jetmoe_megatron.config.schema import Model


def hf_config(model: Model, max_positions: int, dtype: str, special_tokens: dict[str, int]) -> dict[str, Any]:
    """In the names of `transformers`, and beside them those of the original repository, so that both read it rightly.

    `transformers` does not know the original names and falls back to its defaults without a word.
    """
    return {
        "architectures": ["JetMoeForCausalLM"],
        "model_type": "jetmoe",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_kv_heads,
        "num_attention_heads": model.num_kv_heads * model.top_k,
        "kv_channels": model.kv_channels,
        "intermediate_size": model.ffn_hidden_size,
        "num_local_experts": model.num_experts,
        "num_experts_per_tok": model.top_k,
        "activation_function": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": True,
        "initializer_range": model.init_std,
        "torch_dtype": dtype,
        "use_cache": True,
        **special_tokens,
        # names of the original repository
        "num_layers": model.num_layers,
        "ffn_hidden_size": model.ffn_hidden_size,
        "moe_num_experts": model.num_experts,
        "moe_top_k": model.top_k,
        "layer_norm_epsilon": model.norm_eps,
        "n_positions": max_positions,
        "rotary_percent": 1.0,
        "bias": True,
        "glu": True,
    }
