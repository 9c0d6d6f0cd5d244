"""A training step in two halves, and an evaluation, with Megatron's forward-backward schedule around the model.

Between the halves, the numbers of the step are reduced (`metrics.py`) and judged (`loss_guard.py`). Without the second
half, no weight changes.

Letters: B micro-batch, S sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from jetmoe_megatron.data.step_batches import MicroBatch
from jetmoe_megatron.model.router import routers
from jetmoe_megatron.runtime.device import device
from jetmoe_megatron.training.gradient_clipping import clip_gradients
from jetmoe_megatron.training.metrics import reduce_loss
from jetmoe_megatron.training.optimizer import set_learning_rate


def compute_gradients(
    model: list[DistributedDataParallel], optimizer: MegatronOptimizer, batches: list[MicroBatch]
) -> tuple[list[Tensor], float]:
    """Forward and backward over this rank's micro-batches. Weights and moments do not change.

    Returns:
        The (loss sum, tokens) pairs of the micro-batches, on the last pipeline stage, and the gradient norm before
        clipping.
    """
    for chunk in model:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    for router in routers(model):
        router.record.reset()
    if model[0].config.global_balance:
        _count_assignments(model, batches)
    losses = _run_schedule(model, batches, forward_only=False)
    optimizer.prepare_grads()
    return losses, float(optimizer.get_grad_norm())


@torch.no_grad()
def update_weights(optimizer: MegatronOptimizer, gradient_norm: float, learning_rate: float) -> None:
    """Clip the gradients of `compute_gradients` and step.

    Source: megatron/core/optimizer/optimizer.py, `ChainedOptimizer.step`, after it has computed the norm.
    """
    set_learning_rate(optimizer, learning_rate)
    clip_gradients(optimizer, gradient_norm)
    optimizer.step_with_ready_grads()


@torch.no_grad()
def evaluate(model: list[DistributedDataParallel], batches: list[MicroBatch]) -> float:
    """Mean loss in nats per token over the batches of all ranks."""
    for chunk in model:
        chunk.eval()
    losses = _run_schedule(model, batches, forward_only=True)
    for chunk in model:
        chunk.train()
    return reduce_loss(losses)


@torch.no_grad()
def _count_assignments(model: list[DistributedDataParallel], batches: list[MicroBatch]) -> None:
    """Count how many tokens of the whole step each router sends to each expert, for the balance loss."""
    own = list(routers(model))
    for router in own:
        router.counting = True
        router.count_E.zero_()
    _run_schedule(model, batches, forward_only=True)
    for router in own:
        router.counting = False
        torch.distributed.all_reduce(router.count_E, group=router.tp_dp_cp_group)


def _run_schedule(model: list[DistributedDataParallel], batches: list[MicroBatch], forward_only: bool) -> list[Tensor]:
    iterators = [iter(batches) for _ in model]
    return get_forward_backward_func()(
        forward_step_func=functools.partial(_forward_step, _tokens_of_a_micro_batch(batches)),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=model if len(model) > 1 else model[0],
        num_microbatches=len(batches),
        seq_length=batches[0]["tokens"].shape[1],
        micro_batch_size=batches[0]["tokens"].shape[0],
        forward_only=forward_only,
    )


def _tokens_of_a_micro_batch(batches: list[MicroBatch]) -> Tensor:
    """The number of tokens with a loss, on average over the micro-batches of all ranks that read different data.

    Each micro-batch is divided by this and not by its own count, so that all tokens of the step have the same weight.
    """
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    own = torch.stack([batch["loss_mask"].sum(dtype=torch.float64) for batch in batches]).sum()
    total = own.to(device(), non_blocking=True)
    torch.distributed.all_reduce(total, group=group)
    # Context-parallel ranks read the same sequences, and each of them has the loss of its part.
    return (total / (len(batches) * group.size() * parallel_state.get_context_parallel_world_size())).float()


def _forward_step(
    mean_tokens: Tensor, batches: Iterator[MicroBatch], model: Any, return_schedule_plan: bool = False
) -> tuple[Any, Any]:
    """What the schedule runs. Returns the losses [B, S], or a plan for it to interleave, and how to reduce them."""
    whole: dict[str, Any] = dict(next(batches))
    batch = {key: _own_part(value).to(device(), non_blocking=True) for key, value in whole.items()}
    mask = _hidden(batch["document"]) if "document" in batch else None
    forward = model.build_schedule_plan if return_schedule_plan else model
    output = forward(batch["tokens"], batch["position_ids"], mask, labels=batch["labels"])
    return output, functools.partial(_loss, batch["loss_mask"], mean_tokens)


def _own_part(whole_BS: Tensor) -> Tensor:
    """The part [B, S / context] of this context-parallel rank: two of 2 * context chunks, an early and a late one.

    That is the split that Transformer Engine's ring exchange expects; each rank's part attends to as many tokens.
    Source: megatron/core/utils.py, `get_batch_on_this_cp_rank`, whose arguments and default group differ by version.
    """
    ranks, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if ranks == 1:
        return whole_BS
    chunks = whole_BS.chunk(2 * ranks, dim=1)
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]], dim=1)


def _hidden(document_BS: Tensor) -> Tensor:
    """bool [B, 1, S, S], true where a query (third) may not see a key (fourth): a later token, or another document."""
    length = document_BS.shape[1]
    later = torch.ones(length, length, dtype=torch.bool, device=document_BS.device).triu(1)
    return later | (document_BS[:, None, :, None] != document_BS[:, None, None, :])


def _loss(mask_BS: Tensor, mean_tokens: Tensor, loss_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron divides the first by the second and by the number of micro-batches; the third is for the metrics."""
    total = (loss_BS.float() * mask_BS).sum()
    one = torch.ones_like(mean_tokens, dtype=torch.int)
    return total / mean_tokens.clamp(min=1e-6), one, torch.stack([total.detach(), mask_BS.sum()])
