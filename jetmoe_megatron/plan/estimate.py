"""How long a step takes and what a run costs, from its rehearsal and the rates of a GPU: an estimate, no measurement.

Each operation takes as long as its FLOPs or its bytes, whichever is longer, at the rates that a hardware file assumes.
Operations of a pass follow each other. When the passes of each stage run is found from Megatron's schedule
(`timeline.py`).
"""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jetmoe_megatron.config.flops import step_flops
from jetmoe_megatron.config.hardware import Hardware
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Precision, Run
from jetmoe_megatron.plan.parts import BACKWARD, FORWARD, RECOMPUTE, SCORES
from jetmoe_megatron.plan.rehearsal import Kernels, Rehearsal, Transfers
from jetmoe_megatron.plan.schedule import orders
from jetmoe_megatron.plan.timeline import GATHER, REDUCTION, UPDATE, Span, StageSeconds, timeline
from jetmoe_megatron.plan.work import MESSAGE

# Collectives that the run may send beside its computation, by the setting that allows it.
_REDUCES, _GATHERS = ("reduce_scatter_tensor", "all_reduce"), ("all_gather_into_tensor",)
_OF_GRADIENTS = ("DATA_PARALLEL_GROUP_WITH_CP", "EXPERT_DATA_PARALLEL_GROUP")


@dataclass(frozen=True)
class StageTime:
    """Seconds of a step on one rank. Messages between stages are in none of them: a stage waits for its neighbours."""

    compute: dict[str, float]  # by part of the model
    transfers: dict[str, float]  # by group; what nothing hides
    hidden_transfers: float  # beside the computation
    host_waits: float
    seconds: StageSeconds  # the same by pass

    @property
    def busy(self) -> float:
        return sum(self.compute.values()) + sum(self.transfers.values()) + self.host_waits


@dataclass(frozen=True)
class Estimate:
    """Of a run on so many GPUs, if each step is like the rehearsed one."""

    stages: list[StageTime]  # of each rehearsed rank
    of_stages: list[StageSeconds]  # of each stage of the pipeline, by its slowest rank
    timeline: list[list[Span]] = field(repr=False)  # of the same
    bubble: float  # share of the step in which the busiest stage waits for others, or for their messages
    step_seconds: float
    tokens_per_second: float
    mfu: float  # by 6N
    mfu_with_attention: float
    days: float
    dollars: float

    def tree(self) -> dict[str, Any]:
        """For JSON, without the timeline, which has each pass of the step."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "timeline"}


def estimate(run: Run, layout: Layout, hardware: Hardware, world: Sequence[Rehearsal]) -> Estimate:
    """
    Args:
        world: ranks of the first stage and of any others. A stage without one takes as long as the nearest before it.
    """
    alone = [stage_time(run, hardware, rehearsal) for rehearsal in world]
    slowest: dict[int, StageTime] = {}
    for rehearsal, stage in zip(world, alone, strict=True):
        number = rehearsal.place["pipeline"]
        slowest[number] = max(slowest.get(number, stage), stage, key=lambda one: one.busy)
    of_all = [slowest[max(one for one in slowest if one <= number)].seconds for number in range(layout.pipeline)]
    spans = timeline(orders(run, layout), of_all)
    stages = [
        _beside_passes(stage, spans[rehearsal.place["pipeline"]]) for rehearsal, stage in zip(world, alone, strict=True)
    ]
    seconds = max(own[-1].end for own in spans)
    busy = max(sum(span.seconds for span in own) for own in spans)
    tokens = run.batch.global_tokens
    flops = step_flops(run.model, run.batch.sequence_length, tokens)
    peak = layout.world * hardware.bf16_tflops * 1e12
    hours = layout.steps * seconds / 3600
    return Estimate(
        stages=stages,
        of_stages=of_all,
        timeline=spans,
        bubble=1 - busy / seconds,
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        mfu=flops.weights_only / seconds / peak,
        mfu_with_attention=flops.with_attention / seconds / peak,
        days=hours / 24,
        dollars=hours * layout.world * hardware.dollars_per_gpu_hour,
    )


def stage_time(run: Run, hardware: Hardware, rehearsal: Rehearsal) -> StageTime:
    """As if all that may run beside the passes were hidden by them."""
    compute: dict[str, float] = defaultdict(float)
    exposed: dict[str, float] = defaultdict(float)
    total: dict[tuple[str, int], float] = defaultdict(float)  # by direction and chunk
    for kernels in rehearsal.kernels:
        seconds = kernels.number * kernel_seconds(kernels, hardware, run.precision)
        compute[kernels.part] += seconds
        total[kernels.direction, kernels.chunk] += seconds
    beside = dict.fromkeys((_REDUCES, _GATHERS), 0.0)
    message = 0.0
    for transfers in rehearsal.transfers:
        seconds = transfers.number * transfer_seconds(transfers, hardware)
        if transfers.direction == MESSAGE:
            neighbour = replace(transfers, ranks=[rehearsal.rank, _neighbour(run, rehearsal)])
            message = max(message, transfer_seconds(neighbour, hardware))
        elif kinds := _overlapped(run, transfers):
            beside[kinds] += seconds
        else:
            exposed[transfers.group] += seconds
            total[transfers.direction, transfers.chunk] += seconds
    for waits in rehearsal.host_waits:
        total[waits.direction, waits.chunk] += waits.number * hardware.assumed.host_wait_seconds

    def of_a_pass(direction: str) -> list[float]:
        return [total[direction, chunk] / rehearsal.micro_batches for chunk in range(run.parallel.virtual_pipeline)]

    return StageTime(
        compute=dict(compute),
        transfers=dict(exposed),
        hidden_transfers=sum(beside.values()),
        host_waits=sum(waits.number for waits in rehearsal.host_waits) * hardware.assumed.host_wait_seconds,
        seconds=StageSeconds(
            forward=of_a_pass(FORWARD),
            recompute=of_a_pass(RECOMPUTE),
            backward=of_a_pass(BACKWARD),
            message=message,
            gather=beside[_GATHERS],
            reduction_beside=beside[_REDUCES],
            reduction=total[REDUCTION, 0],
            update=total[UPDATE, 0],
        ),
    )


def _neighbour(run: Run, rehearsal: Rehearsal) -> int:
    """The rank of the next stage, for the last one of that before, with which this one exchanges messages."""
    stage = rehearsal.world // run.parallel.pipeline  # Megatron's order: ranks of a stage follow each other
    after = rehearsal.rank + stage
    return after if after < rehearsal.world else rehearsal.rank - stage


def _beside_passes(stage: StageTime, spans: Sequence[Span]) -> StageTime:
    """With what the passes of its stage do not hide."""
    late = sum(span.seconds for span in spans if span.direction in (GATHER, REDUCTION)) - stage.seconds.reduction
    late = min(max(late, 0.0), stage.hidden_transfers)
    if not late:
        return stage
    return replace(
        stage, transfers={**stage.transfers, "not hidden": late}, hidden_transfers=stage.hidden_transfers - late
    )


def kernel_seconds(kernels: Kernels, hardware: Hardware, precision: Precision) -> float:
    """Of one of them in a run of that precision."""
    assumed = hardware.assumed
    share = assumed.attention if kernels.part == SCORES else assumed.matmul
    computing = kernels.flops / (hardware.tflops(precision) * 1e12 * share)
    moving = kernels.bytes / (hardware.memory_tb_per_second * 1e12 * assumed.memory)
    return max(computing, moving, assumed.kernel_seconds)


def transfer_seconds(transfers: Transfers, hardware: Hardware) -> float:
    """Of one of them, by the bytes that pass a rank's slowest link: of a ring, unless each rank sends to each other."""
    assumed, ranks, given = hardware.assumed, len(transfers.ranks), transfers.bytes
    if transfers.kind in ("all_to_all", "all_to_all_single"):
        here = _fewest_on_a_node(transfers, hardware)
        within = (here - 1) / ranks * given / _nvlink(hardware)
        beyond = (ranks - here) / ranks * given / _network(hardware)  # no rank of the node can send it for another
        return max(within, beyond, assumed.transfer_seconds)
    through = {
        "all_reduce": 2 * (ranks - 1) / ranks * given,
        "all_gather": (ranks - 1) * given,
        "all_gather_into_tensor": (ranks - 1) * given,
        "reduce_scatter": (ranks - 1) / ranks * given,
        "reduce_scatter_tensor": (ranks - 1) / ranks * given,
    }.get(transfers.kind, given)
    return max(through / _link(transfers, hardware), assumed.transfer_seconds)


def _link(transfers: Transfers, hardware: Hardware) -> float:
    """The rate of a rank in a ring, in bytes per second: NVLink within a node, else its share of the node's network.

    Ranks of a ring on the same node send for each other. Consecutive ranks are on a node.
    """
    here = _fewest_on_a_node(transfers, hardware)
    if here == len(transfers.ranks):
        return _nvlink(hardware)
    together = 1 if transfers.kind in ("send", "recv") else here
    return min(_nvlink(hardware), _network(hardware) * together)


def _fewest_on_a_node(transfers: Transfers, hardware: Hardware) -> int:
    return min(Counter(rank // hardware.gpus_per_node for rank in transfers.ranks).values())


def _nvlink(hardware: Hardware) -> float:
    """Of a GPU, in bytes per second."""
    return hardware.nvlink_gb_per_second * 1e9 * hardware.assumed.nvlink


def _network(hardware: Hardware) -> float:
    """A GPU's share of its node's, in bytes per second."""
    return hardware.network_gbit_per_second * 1e9 / 8 / hardware.gpus_per_node * hardware.assumed.network


def _overlapped(run: Run, transfers: Transfers) -> tuple[str, ...] | None:
    """The kinds to which it belongs, if they may be sent beside the passes."""
    if transfers.group in _OF_GRADIENTS:
        if run.parallel.overlap_grad_reduce and transfers.kind in _REDUCES:
            return _REDUCES
        if run.parallel.overlap_param_gather and transfers.kind in _GATHERS:
            return _GATHERS
    return None


def bytes_needed(hardware: Hardware, rehearsal: Rehearsal) -> float:
    """What a GPU must have for the rehearsed rank: its tensors, what the allocator loses, and what no tensor gets."""
    return with_slack(hardware, sum(rehearsal.memory.most.values()))


def with_slack(hardware: Hardware, tensors: int) -> float:
    """Memory of a GPU whose tensors hold so many bytes."""
    return tensors * (1 + hardware.assumed.fragmentation) + hardware.assumed.reserved_gb * 1e9
