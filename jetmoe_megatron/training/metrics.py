"""The numbers of a step, reduced over all ranks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from jetmoe_megatron.config.flops import peak_tflops
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model.router import routers
from jetmoe_megatron.monitor.routers import KINDS
from jetmoe_megatron.runtime.device import device, has_gpu, held_memory
from jetmoe_megatron.runtime.memory import grown_memory

_OF_A_ROUTER = ("balance_loss", "z_loss", "load_imbalance")


@dataclass(frozen=True)
class StepMetrics:
    """The numbers of a step in `metrics.jsonl`, under these names.

    Router numbers are means over the routers of a kind, micro-batches and data-parallel ranks; the losses are without
    their coefficients (`model/router_losses.py`).
    """

    lm_loss: float  # nats per token of the global batch; NaN if `data.mask_loss` leaves no token with a loss
    moa_balance_loss: float
    moa_z_loss: float
    moa_load_imbalance: float  # the busiest expert's load; 1 is an even share
    moe_balance_loss: float
    moe_z_loss: float
    moe_load_imbalance: float
    grad_norm: float  # before clipping; the mean over ranks, which differ only if something is wrong
    data_wait_seconds: float  # of the rank that waited longest
    host_memory_gb: float  # of the rank that holds most, after forward and backward (`runtime/memory.py`)
    device_memory_gb: float | None = None
    slowest_rank: int | None = None  # where it was timed (`rank_speed.py`)
    slowest_rank_ratio: float | None = None  # its time over the median of all ranks

    def dump(self) -> dict[str, float]:
        return {name: value for name, value in asdict(self).items() if value is not None}


def reduce_metrics(
    model: list[DistributedDataParallel],
    losses: list[Tensor],
    grad_norm: float,
    data_wait: float,
    stop: bool,
    own_seconds: float = 0.0,
) -> tuple[StepMetrics, bool]:
    """What `compute_gradients` found, the same on all ranks, and whether any rank was asked to stop.

    One collective.

    Args:
        losses: (loss sum, tokens) of each micro-batch, on the last pipeline stage.
        data_wait: seconds that this rank waited for the step's micro-batches.
        stop: this rank was asked to stop.
        own_seconds: in which this rank computed what waits for no other; 0: not timed.
    """
    own = torch.tensor(
        [grad_norm, stop, data_wait, own_seconds, grown_memory(), held_memory()], device=device(), dtype=torch.float64
    )
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    of_ranks = torch.zeros(4, world, device=device(), dtype=torch.float64)  # a sum over ranks of one entry for each
    of_ranks[:, rank] = own[2:]
    numbers_of_ranks = {f"of rank/{number}": value for number, value in enumerate(of_ranks.flatten())}
    sums = {**_loss_sums(losses), **_router_sums(model), "grad_norm": own[0], "stop": own[1], **numbers_of_ranks}
    total = _sum_over_ranks(sums)
    values = [total[name] for name in numbers_of_ranks]
    waits, seconds, host, held = (values[first : first + world] for first in range(0, 4 * world, world))
    median = statistics.median_low(seconds)
    is_timed = world > 1 and min(seconds) > 0
    of_routers = {
        f"{kind}_{name}": total[f"{kind}_{name}"] / total[f"{kind}_micro_batches"]
        for kind in KINDS
        for name in _OF_A_ROUTER
    }
    metrics = StepMetrics(
        lm_loss=_mean_loss(total),
        grad_norm=total["grad_norm"] / world,
        data_wait_seconds=max(waits),
        host_memory_gb=max(host) / 1e9,
        device_memory_gb=max(held) / 1e9 if has_gpu() else None,
        slowest_rank=seconds.index(max(seconds)) if is_timed else None,
        slowest_rank_ratio=max(seconds) / median if is_timed else None,
        **of_routers,
    )
    return metrics, total["stop"] > 0


def speed(run: Run, tflops: float) -> dict[str, float]:
    """Of one rank, with attention and without recomputation (`config/flops.py`)."""
    peak = peak_tflops(torch.cuda.get_device_name()) if has_gpu() and run.precision == "bf16" else None
    return {"tflops_per_rank": tflops, **({"mfu": tflops / peak} if peak else {})}


def reduce_loss(losses: list[Tensor]) -> float:
    """Mean loss in nats per token over the micro-batches of all ranks."""
    return _mean_loss(_sum_over_ranks(_loss_sums(losses)))


def _mean_loss(total: Mapping[str, float]) -> float:
    return total["loss_sum"] / total["tokens"] if total["tokens"] else math.nan


def _loss_sums(losses: list[Tensor]) -> dict[str, Tensor]:
    """The sums of this rank: from one tensor rank of the last stage, zero on the others."""
    own = torch.zeros(2, device=device(), dtype=torch.float64)
    if losses and parallel_state.get_tensor_model_parallel_rank() == 0:
        own += torch.stack(losses).sum(0)
    return {"loss_sum": own[0], "tokens": own[1]}


def _router_sums(model: list[DistributedDataParallel]) -> dict[str, Tensor]:
    """The sums over this rank's routers of each kind."""
    sums = {}
    for kind in KINDS:
        own = [router.record for router in routers(model) if router.kind == kind]
        for name in (*_OF_A_ROUTER, "micro_batches"):
            total = sum(getattr(record, name) for record in own)
            sums[f"{kind}_{name}"] = torch.as_tensor(total, device=device(), dtype=torch.float32)
    return sums


def _sum_over_ranks(own: Mapping[str, Tensor]) -> dict[str, float]:
    total = torch.stack([value.double() for value in own.values()])
    torch.distributed.all_reduce(total)
    return dict(zip(own, total.tolist(), strict=True))
