"""Megatron's data-parallel wrapper and optimizer."""

from __future__ import annotations

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module

from jetmoe_megatron.config.schema import Run


def wrap_for_data_parallel(run: Run, chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """Gradients are accumulated and reduced in fp32, averaged over data-parallel ranks."""
    config = chunks[0].config
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    modules = [Float16Module(config, chunk) if run.precision == "bf16" else chunk for chunk in chunks]
    wrapped = [DistributedDataParallel(config, ddp_config, module) for module in modules]
    config.finalize_model_grads_func = finalize_model_grads
    config.no_sync_func = wrapped[0].no_sync if len(wrapped) == 1 else [model.no_sync for model in wrapped]
    return wrapped


def build_optimizer(run: Run, model: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW with fp32 main weights. Norms and biases, the parameters of one dimension, do not decay:

    their size does not measure complexity, and it is what Megatron does (optimizer/__init__.py,
    get_standard_config_overrides).
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
        use_distributed_optimizer=False,
    )
    return get_megatron_optimizer(config, model, use_gloo_process_groups=False)


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
