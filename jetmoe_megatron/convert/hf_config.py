"""config.json of a Hugging Face folder, in two dialects: the names of `transformers` and of the original repository.

It is written with both, and read with either.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from jetmoe_megatron.config.checks import check_model
from jetmoe_megatron.config.schema import Model
from jetmoe_megatron.errors import UserError

# The names of `transformers` come first. It does not know the original names and silently uses its defaults instead.
_NAMES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "num_layers"),
    "hidden_size": ("hidden_size",),
    "num_kv_heads": ("num_key_value_heads",),
    "kv_channels": ("kv_channels",),
    "ffn_hidden_size": ("intermediate_size", "ffn_hidden_size"),
    "num_experts": ("num_local_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_top_k"),
    "vocab_size": ("vocab_size",),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon"),
    "rope_theta": ("rope_theta",),
    "init_std": ("initializer_range",),
}
_MAX_POSITIONS = ("max_position_embeddings", "n_positions")
_MAY_BE_MISSING = ("rope_theta", "init_std")  # no config of the original repository has init_std
# The same in every JetMoE.
_FIXED = {"activation_function": "silu", "tie_word_embeddings": True, "rotary_percent": 1.0, "bias": True, "glu": True}


def hf_config(model: Model, max_positions: int, dtype: str, special_tokens: dict[str, Any]) -> dict[str, Any]:
    """config.json with the names of `transformers` and of the original repository, so that both read it correctly."""
    shape = {name: getattr(model, field) for field, names in _NAMES.items() for name in names}
    return {
        "architectures": ["JetMoeForCausalLM"],
        "model_type": "jetmoe",
        **shape,
        "num_attention_heads": model.num_kv_heads * model.top_k,
        **dict.fromkeys(_MAX_POSITIONS, max_positions),
        **_FIXED,
        "torch_dtype": dtype,
        "use_cache": True,
        **special_tokens,
    }


def read_hf_config(config: dict[str, Any]) -> tuple[Model, int]:
    """The model and its longest sequence, from a config.json in either or both dialects.

    Raises:
        UserError: names the key that is missing, contradicts another or asks for another model.
    """
    if config.get("model_type") != "jetmoe":
        raise UserError(f"model_type: must be 'jetmoe', not {config.get('model_type')!r}")
    config = {**config, **_rope(config)}
    for key, value in _FIXED.items():
        if config.get(key, value) != value:
            raise UserError(f"{key}: JetMoE has {value!r}, not {config[key]!r}")
    fields = {field: _value(config, names, field in _MAY_BE_MISSING) for field, names in _NAMES.items()}
    try:
        model = Model.model_validate({field: value for field, value in fields.items() if value is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        name = " or ".join(_NAMES[str(problem["loc"][0])])
        raise UserError(f"{name}: {problem['msg']}, not {problem['input']!r}") from None
    check_model(model)
    max_positions = _value(config, _MAX_POSITIONS, may_be_missing=False)
    if type(max_positions) is not int or max_positions < 1:
        raise UserError(f"{' or '.join(_MAX_POSITIONS)}: must be a positive number, not {max_positions!r}")
    return model, max_positions


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary settings. transformers 5 has all of them in one object; 4 has an object only if they are not plain."""
    theta: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = config.get(name) or {}
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default":
            raise UserError(f"{name}: only plain rotary embeddings are supported, not {rope}")
        theta |= {key: value for key, value in rope.items() if key == "rope_theta"}
    return theta


def _value(config: dict[str, Any], names: tuple[str, ...], may_be_missing: bool) -> Any:
    given = {name: config[name] for name in names if config.get(name) is not None}
    if not given and not may_be_missing:
        raise UserError(f"{' or '.join(names)}: is missing")
    first = next(iter(given.values()), None)
    if any(value != first for value in given.values()):
        raise UserError(" contradicts ".join(f"{name} {value}" for name, value in given.items()))
    return first
