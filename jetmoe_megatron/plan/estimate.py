"""How long a step takes and what a run costs, from its rehearsal and the rates of a GPU: an estimate, no measurement.

Each operation takes as long as its FLOPs or its bytes, whichever is longer, at the rates that a hardware file assumes.
Operations of a rank follow each other. A stage waits for the slowest one, and at both ends of a step for the pipeline
to fill and to drain.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from jetmoe_megatron.config.flops import step_flops
from jetmoe_megatron.config.hardware import Hardware
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.parts import SCORES
from jetmoe_megatron.plan.rehearsal import Kernels, Rehearsal, Transfers

# Messages and collectives that the run may send beside its computation, by the setting that allows it.
_REDUCES, _GATHERS = ("reduce_scatter_tensor", "all_reduce"), ("all_gather_into_tensor",)
_OF_GRADIENTS = ("DATA_PARALLEL_GROUP_WITH_CP", "EXPERT_DATA_PARALLEL_GROUP")


@dataclass(frozen=True)
class StageTime:
    """Seconds of a step on one rank."""

    compute: dict[str, float]  # by part of the model
    transfers: dict[str, float]  # by group; what nothing hides
    hidden_transfers: float  # beside the computation
    host_waits: float

    @property
    def busy(self) -> float:
        return sum(self.compute.values()) + sum(self.transfers.values()) + self.host_waits


@dataclass(frozen=True)
class Estimate:
    """Of a run on so many GPUs, if each step is like the rehearsed one."""

    stages: list[StageTime]
    bubble: float  # share of the step in which a rank of the slowest stage waits for others
    step_seconds: float
    tokens_per_second: float
    mfu: float  # by 6N
    mfu_with_attention: float
    days: float
    dollars: float


def estimate(run: Run, layout: Layout, hardware: Hardware, world: Sequence[Rehearsal]) -> Estimate:
    """world: of `rehearse_world`."""
    stages = [stage_time(run, hardware, rehearsal) for rehearsal in world]
    slowest = max(stage.busy for stage in stages)
    # With the 1F1B schedule, virtual stages shorten it (arXiv 2104.04473, section 2.2).
    waits = (layout.pipeline - 1) / (layout.virtual_pipeline * layout.micro_batches) * slowest
    seconds = slowest + waits
    tokens = run.batch.global_tokens
    flops = step_flops(run.model, run.batch.sequence_length, tokens)
    peak = layout.world * hardware.bf16_tflops * 1e12
    hours = layout.steps * seconds / 3600
    return Estimate(
        stages=stages,
        bubble=waits / seconds,
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        mfu=flops.weights_only / seconds / peak,
        mfu_with_attention=flops.with_attention / seconds / peak,
        days=hours / 24,
        dollars=hours * layout.world * hardware.dollars_per_gpu_hour,
    )


def stage_time(run: Run, hardware: Hardware, rehearsal: Rehearsal) -> StageTime:
    compute: dict[str, float] = defaultdict(float)
    for kernels in rehearsal.kernels:
        compute[kernels.part] += kernels.number * kernel_seconds(kernels, hardware)
    exposed: dict[str, float] = defaultdict(float)
    hidden = 0.0
    for transfers in rehearsal.transfers:
        seconds = transfers.number * transfer_seconds(transfers, hardware)
        if _is_overlapped(run, transfers):
            hidden += seconds
        else:
            exposed[transfers.group] += seconds
    # Reductions run beside the backward pass of the last micro-batch, gathers beside the forward pass of the first.
    beside = sum(compute.values()) / rehearsal.micro_batches
    exposed["not hidden"] += max(0.0, hidden - beside)
    waits = sum(rehearsal.host_waits.values()) * hardware.assumed.host_wait_seconds
    return StageTime(dict(compute), dict(exposed), min(hidden, beside), waits)


def kernel_seconds(kernels: Kernels, hardware: Hardware) -> float:
    """Of one of them."""
    assumed = hardware.assumed
    share = assumed.attention if kernels.part == SCORES else assumed.matmul
    computing = kernels.flops / (hardware.bf16_tflops * 1e12 * share)
    moving = kernels.bytes / (hardware.memory_tb_per_second * 1e12 * assumed.memory)
    return max(computing, moving, assumed.kernel_seconds)


def transfer_seconds(transfers: Transfers, hardware: Hardware) -> float:
    """Of one of them, by the bytes that pass a rank's slowest link in a ring."""
    assumed, ranks = hardware.assumed, len(transfers.ranks)
    given = transfers.bytes
    through = {
        "all_reduce": 2 * (ranks - 1) / ranks * given,
        "all_gather": (ranks - 1) * given,
        "all_gather_into_tensor": (ranks - 1) * given,
        "reduce_scatter": (ranks - 1) / ranks * given,
        "reduce_scatter_tensor": (ranks - 1) / ranks * given,
        "all_to_all": (ranks - 1) / ranks * given,
        "all_to_all_single": (ranks - 1) / ranks * given,
    }.get(transfers.kind, given)
    return max(through / (link(transfers, hardware) * 1e9), assumed.transfer_seconds)


def link(transfers: Transfers, hardware: Hardware) -> float:
    """The rate of a rank in 10^9 bytes per second: NVLink within a node, else its share of the node's network.

    Ranks of a group on the same node send for each other. Consecutive ranks are on a node.
    """
    assumed, per_node = hardware.assumed, hardware.gpus_per_node
    nvlink = hardware.nvlink_gb_per_second * assumed.nvlink
    nodes = {rank // per_node for rank in transfers.ranks}
    if len(nodes) == 1:
        return nvlink
    together = 1 if transfers.kind in ("send", "recv") else len(transfers.ranks) / len(nodes)
    network = hardware.network_gbit_per_second / 8 / per_node * assumed.network
    return min(nvlink, network * together)


def _is_overlapped(run: Run, transfers: Transfers) -> bool:
    if transfers.group not in _OF_GRADIENTS:
        return False
    return (run.parallel.overlap_grad_reduce and transfers.kind in _REDUCES) or (
        run.parallel.overlap_param_gather and transfers.kind in _GATHERS
    )


def bytes_needed(hardware: Hardware, rehearsal: Rehearsal) -> float:
    """What a GPU must have for the rehearsed rank: its tensors, what the allocator loses, and what no tensor gets."""
    peaks = rehearsal.memory.peak, rehearsal.memory.peak_in_update
    return with_slack(hardware, max(sum(peak.values()) for peak in peaks))


def with_slack(hardware: Hardware, tensors: int) -> float:
    """Memory of a GPU whose tensors hold so many bytes."""
    return tensors * (1 + hardware.assumed.fragmentation) + hardware.assumed.reserved_gb * 1e9
