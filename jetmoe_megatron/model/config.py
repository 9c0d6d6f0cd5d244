"""From the YAML's model section to Megatron-Core's TransformerConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer import TransformerConfig

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model.exchange_options import exchange_options
from jetmoe_megatron.model.experts.choose_backend import choose_backend
from jetmoe_megatron.model.fusion import can_fuse

# The released code builds the norms inside the layers with this eps whatever its config says
# (transformers/models/jetmoe/modeling_jetmoe.py: `JetMoeRMSNorm(config.hidden_size)`), so training does too.
LAYER_NORM_EPS = 1e-6

# What the names in a run file mean here. A name that the schema allows but a table lacks is a KeyError.
DTYPE = {"bf16": torch.bfloat16, "fp32": torch.float32}
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_activation": True},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
_IS_SHARDED = {"replicated": False, "sharded": True}
_IS_GLOBAL = {"micro_batch": False, "global_batch": True}


@dataclass
class JetMoEConfig(TransformerConfig):
    """Megatron-Core's config, plus the few settings that it has no field for."""

    final_norm_eps: float = 1e-5
    expert_backend: str = "torch"
    recompute_activation: bool = False  # recompute: selective
    shard_attention_experts: bool = False
    global_balance: bool = False  # losses.scope: global_batch

    @property
    def delays_mlp_experts_only(self) -> bool:
        """An option of Megatron-Core 0.19."""
        return bool(getattr(self, "overlap_dispatch_backward_with_experts_wgrad", False))


def _has_transformer_engine() -> bool:
    return torch.cuda.is_available() and HAVE_TE


def _leave_as_it_is(weight: torch.Tensor) -> None:
    pass


def _stages(run: Run) -> list[list[str]] | None:
    """Megatron's description of uneven stages: what each stage holds, in pipeline order. None if stages are even."""
    layers = run.parallel.layers_per_stage
    if layers is None or len(layers) == 1:
        return None
    stages = [["decoder"] * count for count in layers]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def transformer_config(run: Run, layout: Layout) -> JetMoEConfig:
    """The config of every layer. It reads the sizes of the parallel groups, not the groups themselves."""
    model = run.model
    dtype = DTYPE[run.precision]
    return JetMoEConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        kv_channels=model.kv_channels,
        num_query_groups=model.num_kv_heads,
        num_attention_heads=model.num_kv_heads * model.top_k,
        # Both kinds of experts have the same number and the same k, as in Hugging Face's JetMoE config.
        num_moe_experts=model.num_experts,
        moe_router_topk=model.top_k,
        # Our gate is always the softmax over the chosen logits. With top-1, Megatron refuses False here: the gate is
        # then 1, and the router learns from its auxiliary losses only. That is what JetMoE's formula says.
        moe_router_pre_softmax=model.top_k == 1,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=run.losses.balance,
        moe_z_loss_coeff=run.losses.z,
        **exchange_options(run),
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        layernorm_epsilon=LAYER_NORM_EPS,
        final_norm_eps=model.norm_eps,
        add_bias_linear=False,
        bias_dropout_fusion=can_fuse(),
        # The fused kernel's gradient is in bf16, whatever the dtype of the logits (fused_cross_entropy.py,
        # `calculate_gradients`).
        cross_entropy_loss_fusion=run.precision == "bf16" and can_fuse(),
        # Transformer Engine's kernels, for rows that Megatron's token dispatcher sends. Local rows use
        # `permutation.py`.
        moe_permute_fusion=layout.expert * layout.expert_tensor > 1 and _has_transformer_engine(),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # `initial_weights.py` draws the weights. Megatron's own pass must still run: it marks which are split.
        init_method=_leave_as_it_is,
        output_layer_init_method=_leave_as_it_is,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=run.precision == "bf16",
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence_parallel,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        microbatch_group_size_per_vp_stage=layout.micro_batch_group if layout.virtual_pipeline > 1 else None,
        # Batched transfers confuse a stage's two neighbours if both are the same rank, as with two interleaved stages.
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        batch_p2p_comm=layout.virtual_pipeline == 1,
        batch_p2p_sync=False,  # a wait for the whole GPU after each transfer, for versions of torch before 2.0
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        pipeline_model_parallel_layout=_stages(run),
        **_RECOMPUTE[run.recompute],
        gradient_accumulation_fusion=False,  # needs NVIDIA's Apex
        shard_attention_experts=_IS_SHARDED[run.parallel.attention_experts],
        global_balance=_IS_GLOBAL[run.losses.scope],
        expert_backend=choose_backend(run, layout).name,
    )
