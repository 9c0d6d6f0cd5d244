"""Megatron's data-parallel wrapper and optimizer."""

from __future__ import annotations

import logging
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import (
    USING_PYTORCH_OPTIMIZER,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.transformer.module import Float16Module

from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.training.gradient_clipping import replace_norm_and_scale


def wrap_for_data_parallel(run: Run, chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """Gradients are accumulated and reduced in fp32, averaged over data-parallel ranks."""
    # Newer versions of Megatron-Core say that they compute which rank has which part of the optimizer's state.
    logging.getLogger("megatron.core.distributed.distributed_data_parallel").setLevel(logging.ERROR)
    config = chunks[0].config
    parallel, distributed = run.parallel, is_distributed(run)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather and distributed,
        delay_wgrad_compute=parallel.delay_wgrad_compute or parallel.overlap_dispatch_backward_with_experts_wgrad,
    )
    modules = [Float16Module(config, chunk) if run.precision == "bf16" else chunk for chunk in chunks]
    wrapped = [DistributedDataParallel(config, ddp_config, module) for module in modules]
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = _per_chunk([model.no_sync for model in wrapped])
    if parallel.overlap_grad_reduce:
        config.grad_sync_func = _per_chunk([model.start_grad_sync for model in wrapped])
    if ddp_config.overlap_param_gather:
        config.param_sync_func = _per_chunk([model.start_param_sync for model in wrapped])
    return wrapped


def is_distributed(run: Run) -> bool:
    """One rank shares the optimizer's state with no other, and Megatron would copy all gradients and weights."""
    dense = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    return run.parallel.distributed_optimizer and max(dense, parallel_state.get_expert_data_parallel_world_size()) > 1


def _per_chunk(functions: list[Any]) -> Any:
    """Megatron's schedules take one function, or a list of them with virtual pipeline stages."""
    return functions if len(functions) > 1 else functions[0]


def settle_weights(model: list[DistributedDataParallel]) -> None:
    """Wait for weights that `parallel.overlap_param_gather` would gather only in the next forward pass."""
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(run: Run, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW with fp32 main weights. Parameters of one dimension (norms, biases) do not decay, as in Megatron.

    Source: megatron/core/optimizer/__init__.py, `get_standard_config_overrides`.
    """
    options = run.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.max_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.betas[0],
        adam_beta2=options.betas[1],
        adam_eps=options.eps,
        clip_grad=options.clip_grad,
        bf16=run.precision == "bf16",
        params_dtype=torch.bfloat16 if run.precision == "bf16" else torch.float32,
        use_distributed_optimizer=is_distributed(run),
    )
    if USING_PYTORCH_OPTIMIZER:
        replace_norm_and_scale()
    optimizer = get_megatron_optimizer(config, model, use_gloo_process_groups=False)
    for group in optimizer.param_groups:  # done by Megatron's scheduler, which is not used here
        group["weight_decay"] = options.weight_decay * group["wd_mult"]
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            _prepare(part.optimizer)
    return optimizer


def _prepare(adamw: torch.optim.AdamW) -> None:
    """Create its state before the first step, so that a checkpoint can be saved or loaded then."""
    for group in adamw.param_groups:
        group["fused"] = True  # one kernel instead of a dozen passes; Megatron has no option for it
        for parameter in group["params"]:
            zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            adamw.state[parameter] = {"step": torch.tensor(0.0, device=parameter.device), **zeros}


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
