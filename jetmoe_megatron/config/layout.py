"""How a run is divided over ranks: the arithmetic, and errors that name what cannot be divided."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups of one run, and its batch arithmetic."""

    world: int
    tensor: int
    sequence_parallel: bool
    pipeline: int
    virtual_pipeline: int
    expert: int
    expert_tensor: int
    context: int
    data: int
    global_sequences: int  # per step
    micro_batches: int  # per step and data-parallel rank
    micro_batch_group: int  # how many pass a virtual stage in a row; 1 without virtual stages
    phase_steps: tuple[int, ...]

    @property
    def steps(self) -> int:
        return sum(self.phase_steps)

    def phase_at(self, step: int) -> int:
        """Index of the phase that the given step (from 0) belongs to."""
        end = 0
        for phase, steps in enumerate(self.phase_steps):
            end += steps
            if step < end:
                return phase
        raise IndexError(f"step {step} is beyond the run's {end} steps")


def resolve_layout(run: Run, world: int) -> Layout:
    """Raises UserError with one line that names the keys that do not fit each other or the world size."""
    parallel, model, batch = run.parallel, run.model, run.batch
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        raise UserError("parallel.overlap_param_gather: needs distributed_optimizer and overlap_grad_reduce")
    if parallel.overlap_moe_expert_parallel_comm and (missing := _missing_for_expert_overlap(run)):
        raise UserError(f"parallel.overlap_moe_expert_parallel_comm: needs {missing}")
    _check_exchange(run)
    if parallel.attention_experts == "sharded" and parallel.expert_tensor != parallel.tensor:
        raise UserError(
            "parallel.attention_experts: sharded needs parallel.expert_tensor equal to parallel.tensor "
            f"({parallel.tensor}): the heads of an expert are split over the tensor-parallel ranks"
        )
    model_parallel = parallel.tensor * parallel.pipeline * parallel.context
    if world % model_parallel:
        context = f" x context {parallel.context}" if parallel.context > 1 else ""
        raise UserError(
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline}{context} = {model_parallel} does not "
            f"divide the world of {world} ranks"
        )
    expert_parallel = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if world % expert_parallel:
        raise UserError(
            f"parallel: expert {parallel.expert} x expert_tensor {parallel.expert_tensor} x pipeline "
            f"{parallel.pipeline} = {expert_parallel} does not divide the world of {world} ranks"
        )
    _divides("parallel.tensor", parallel.tensor, "model.num_kv_heads", model.num_kv_heads)
    _divides("parallel.tensor", parallel.tensor, "model.vocab_size", model.vocab_size)
    _divides("parallel.expert", parallel.expert, "model.num_experts", model.num_experts)
    _divides("parallel.expert_tensor", parallel.expert_tensor, "model.ffn_hidden_size", model.ffn_hidden_size)
    stages = parallel.pipeline * parallel.virtual_pipeline
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        raise UserError("parallel.virtual_pipeline: needs parallel.pipeline > 1")
    if parallel.layers_per_stage is not None:
        _check_stages(parallel.layers_per_stage, stages, model.num_layers)
    elif model.num_layers % stages:
        raise UserError(
            f"parallel: pipeline {parallel.pipeline} x virtual_pipeline {parallel.virtual_pipeline} = {stages} does "
            f"not divide model.num_layers ({model.num_layers}); set parallel.layers_per_stage"
        )
    sequence_parallel = parallel.tensor > 1 if parallel.sequence == "auto" else bool(parallel.sequence)
    if parallel.tensor > 1 and not sequence_parallel:
        raise UserError("parallel.sequence: Megatron's MoE layers need sequence parallelism when parallel.tensor > 1")
    if sequence_parallel and parallel.tensor == 1:
        raise UserError("parallel.sequence: needs parallel.tensor > 1")
    _divides("parallel.tensor", parallel.tensor, "batch.sequence_length", batch.sequence_length)
    if parallel.context > 1 and batch.sequence_length % (2 * parallel.context * parallel.tensor):
        raise UserError(
            f"parallel.context: batch.sequence_length ({batch.sequence_length}) is not a multiple of 2 x context "
            f"{parallel.context} x tensor {parallel.tensor}: each rank takes two chunks of the sequence"
        )
    data = world // model_parallel
    sequences = batch.global_tokens // batch.sequence_length
    if sequences % (data * batch.micro_sequences):
        raise UserError(
            f"batch: {sequences} sequences per step (global_tokens / sequence_length) do not divide into "
            f"{data} data-parallel ranks x {batch.micro_sequences} micro_sequences"
        )
    micro_batches = sequences // (data * batch.micro_sequences)
    if parallel.virtual_pipeline > 1 and micro_batches < parallel.pipeline:
        raise UserError(
            f"parallel.virtual_pipeline: a step has {micro_batches} micro-batches, fewer than parallel.pipeline "
            f"({parallel.pipeline}) stages"
        )
    return Layout(
        world=world,
        tensor=parallel.tensor,
        sequence_parallel=sequence_parallel,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        context=parallel.context,
        data=data,
        global_sequences=sequences,
        micro_batches=micro_batches,
        micro_batch_group=_group(micro_batches, parallel.pipeline) if parallel.virtual_pipeline > 1 else 1,
        phase_steps=phase_steps(run),
    )


def _group(micro_batches: int, stages: int) -> int:
    """The smallest that Megatron takes, because each stage keeps what so many have computed: a last group with fewer
    than all has at least as many as there are stages.

    Source: megatron/core/pipeline_parallel/schedules.py, `forward_backward_pipelining_with_interleaving`.
    """
    sizes = range(stages, micro_batches + 1)
    return next(size for size in sizes if micro_batches % size == 0 or micro_batches % size >= stages)


def phase_steps(run: Run) -> tuple[int, ...]:
    """Steps of each phase. A phase ends with a whole batch: its tokens are rounded up."""
    return tuple(math.ceil(phase.tokens / run.batch.global_tokens) for phase in run.phases)


def _missing_for_expert_overlap(run: Run) -> str | None:
    """Source: megatron/core/transformer/transformer_config.py, `__post_init__`."""
    if run.parallel.expert == 1:
        return "parallel.expert > 1"
    if run.precision != "bf16":
        return "precision: bf16"
    if run.recompute == "full":
        return "recompute: none or selective"
    if run.parallel.pipeline > 1 and run.parallel.virtual_pipeline == 1:
        return "parallel.virtual_pipeline > 1 if parallel.pipeline > 1"
    return None


def _check_exchange(run: Run) -> None:
    """The options of the exchange of the experts' rows. What the machine lacks for them is found in preflight.py."""
    parallel = run.parallel
    overlap, delayed = parallel.overlap_moe_expert_parallel_comm, parallel.delay_wgrad_compute
    alone = parallel.overlap_dispatch_backward_with_experts_wgrad
    if parallel.moe_token_dispatcher != "alltoall":
        if parallel.expert == 1:
            raise UserError(f"parallel.moe_token_dispatcher: {parallel.moe_token_dispatcher} needs parallel.expert > 1")
        if run.precision != "bf16":
            raise UserError(f"parallel.moe_token_dispatcher: {parallel.moe_token_dispatcher} needs precision: bf16")
    for key in ("delay_wgrad_compute", "high_priority_a2a_comm_stream"):
        if getattr(parallel, key) and not overlap:
            raise UserError(f"parallel.{key}: needs parallel.overlap_moe_expert_parallel_comm")
    if alone and parallel.expert == 1:
        raise UserError("parallel.overlap_dispatch_backward_with_experts_wgrad: needs parallel.expert > 1")
    if alone and (overlap or delayed):
        raise UserError(
            "parallel.overlap_dispatch_backward_with_experts_wgrad: does not go with overlap_moe_expert_parallel_comm"
        )


def _check_stages(layers: list[int], stages: int, num_layers: int) -> None:
    if len(layers) != stages:
        raise UserError(
            f"parallel.layers_per_stage: has {len(layers)} entries for {stages} stages (pipeline x virtual_pipeline)"
        )
    if sum(layers) != num_layers:
        raise UserError(f"parallel.layers_per_stage: adds up to {sum(layers)}, not to model.num_layers ({num_layers})")


def _divides(divisor_key: str, divisor: int, key: str, value: int) -> None:
    if value % divisor:
        raise UserError(f"{divisor_key}: {divisor} does not divide {key} ({value})")
