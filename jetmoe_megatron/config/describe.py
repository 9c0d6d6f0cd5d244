"""What a run will do, in a few lines, computed from its config alone."""

from __future__ import annotations

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Model, Run


def describe(run: Run, layout: Layout) -> str:
    """Model size, layout, batch and phases, one per line."""
    total, active = count_parameters(run.model)
    lines = [
        f"run {run.name}: {total / 1e6:,.1f}M parameters, {active / 1e6:,.1f}M active per token, {run.precision}",
        f"  ranks    {layout.world} ({describe_layout(layout)})",
        f"  batch    {run.batch.global_tokens:,} tokens = {layout.global_sequences} sequences of "
        f"{run.batch.sequence_length}, {layout.micro_batches} micro-batches of {run.batch.micro_sequences} per rank",
        f"  output   {run.output_dir}",
    ]
    for phase, steps in zip(run.phases, layout.phase_steps, strict=True):
        mixture = ", ".join(f"{name} {share:.1%}" for name, share in phase.shares.items())
        tokens = steps * run.batch.global_tokens
        lines.append(f"  phase    {phase.name}: {steps:,} steps, {tokens:,} tokens, {phase.learning_rate}; {mixture}")
    return "\n".join(lines)


def describe_layout(layout: Layout) -> str:
    """`tensor 2 x data 4`."""
    splits = {
        "tensor": layout.tensor,
        "pipeline": layout.pipeline,
        "virtual pipeline": layout.virtual_pipeline,
        "expert": layout.expert,
        "expert tensor": layout.expert_tensor,
        "context": layout.context,
        "data": layout.data,
    }
    return " x ".join(f"{name} {size}" for name, size in splits.items() if size > 1) or "no parallelism"


def count_parameters(model: Model) -> tuple[int, int]:
    """The number of all parameters, and of those that one token uses. The tied embedding counts once, as active."""
    hidden, width = model.hidden_size, model.num_kv_heads * model.kv_channels
    attention_expert, mlp_expert = 2 * width * hidden, 3 * model.ffn_hidden_size * hidden
    shared = 2 * width * hidden + 2 * model.num_experts * hidden + 4 * hidden  # kv, routers, biases and norms
    outside = model.vocab_size * hidden + hidden
    layer = attention_expert + mlp_expert
    return (
        model.num_layers * (model.num_experts * layer + shared) + outside,
        model.num_layers * (model.top_k * layer + shared) + outside,
    )
