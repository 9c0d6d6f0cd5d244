"""What a plan says, as tables: for the terminal (`text.py`) and for a page (`page.py`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_tools.units import shown
from jetmoe_megatron.config.describe import count_parameters, describe_layout
from jetmoe_megatron.plan.estimate import bytes_needed, transfer_seconds
from jetmoe_megatron.plan.plan import Plan
from jetmoe_megatron.plan.rehearsal import Rehearsal

NO_MEASUREMENT = "All figures are computed from a rehearsal of the program. None is a measurement."
# Megatron's process groups. Without context parallelism, groups with and without it are the same.
GROUPS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tensor",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pipeline",
    "DATA_PARALLEL_GROUP": "data parallel",
    "DATA_PARALLEL_GROUP_WITH_CP": "data parallel",
    "EXPERT_MODEL_PARALLEL_GROUP": "expert",
    "EXPERT_TENSOR_PARALLEL_GROUP": "expert tensor",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "expert and expert tensor",
    "EXPERT_DATA_PARALLEL_GROUP": "expert data parallel",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "all parts of the experts",
    "MODEL_PARALLEL_GROUP": "all parts of the model",
    "TENSOR_AND_DATA_PARALLEL_GROUP": "tensor and data parallel",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tensor and data parallel",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tensor and context",
    "CONTEXT_PARALLEL_GROUP": "context",
    "EMBEDDING_GROUP": "first and last stage",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "all ranks",
    "default_pg": "all ranks",
}


@dataclass(frozen=True)
class Table:
    """
    Attributes:
        notes: what was assumed, and what the columns mean.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)


def head(plan: Plan) -> list[str]:
    run, layout, hardware = plan.run, plan.layout, plan.hardware
    total, active = count_parameters(run.model)
    nodes = -(-layout.world // hardware.gpus_per_node)
    return [
        f"{run.name}: {total / 1e9:,.2f}B parameters, {active / 1e9:,.2f}B active, {run.precision}",
        f"on {layout.world} {hardware.gpu}, {nodes} node{'s' * (nodes > 1)}: {describe_layout(layout)}",
        f"{layout.micro_batches} micro-batches of {run.batch.micro_sequences} x {run.batch.sequence_length} tokens; "
        f"the fullest expert gets {plan.imbalance:g} times the mean",
        NO_MEASUREMENT,
    ]


def memory(plan: Plan) -> Table:
    assumed = plan.hardware.assumed
    kinds = list(dict.fromkeys(kind for one in plan.world for kind in one.memory.most))
    rows = []
    for one in plan.world:
        held = [shown(one.memory.most.get(kind, 0), "B") for kind in kinds]
        rows.append([name(one, plan.world), *held, shown(bytes_needed(plan.hardware, one), "B")])
    return Table(
        f"Memory: {plan.verdict}. The fullest GPU has {left(plan)}.",
        ["rank", *kinds, "needed"],
        rows,
        [
            f"needed: the most that is held at once, in a step or a save, assumed {assumed.fragmentation:.0%} that the "
            f"allocator loses between tensors, and assumed {assumed.reserved_gb:g} GB for CUDA, NCCL and workspaces"
        ],
    )


def left(plan: Plan) -> str:
    share, whole = plan.left, f"{plan.hardware.memory_gb:g} GB"
    return f"{share:.0%} of {whole} left" if share >= 0 else f"{-share:.0%} of {whole} too little"


def work(plan: Plan) -> Table:
    slowest = plan.slowest
    flops, stage = slowest.flops(), plan.stage(slowest)
    numbers: dict[str, int] = defaultdict(int)
    for kernels in slowest.kernels:
        numbers[kernels.part] += kernels.number
    rows = [
        [part, shown(flops[part], "FLOP") if part in flops else "", f"{numbers[part]:,}", f"{seconds:.3f} s"]
        for part, seconds in sorted(stage.compute.items(), key=lambda item: -item[1])
    ]
    return Table("Computed in a step, by the slowest rank:", ["part", "FLOPs", "kernels", "time"], rows)


def sent(plan: Plan) -> Table:
    rows: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for transfers in plan.slowest.transfers:
        nodes = {rank // plan.hardware.gpus_per_node for rank in transfers.ranks}
        group = GROUPS.get(transfers.group, transfers.group)
        row = rows[group, transfers.kind, "NVLink" if len(nodes) == 1 else "network"]
        row[0] += transfers.number
        row[1] += transfers.number * transfers.bytes
        row[2] += transfers.number * transfer_seconds(transfers, plan.hardware)
    cells = [
        [*key, f"{number:,.0f}", shown(size, "B"), f"{seconds:.3f} s"] for key, (number, size, seconds) in rows.items()
    ]
    return Table(
        "Sent in a step, by the slowest rank:", ["group", "what", "link", "number", "bytes", "time alone"], cells
    )


def time(plan: Plan) -> Table:
    estimate, hardware, assumed = plan.estimate, plan.hardware, plan.hardware.assumed
    stage = plan.stage(plan.slowest)
    rows = [
        ["computing", f"{sum(stage.compute.values()):.3f} s", _rates(plan)],
        ["sending, not hidden", f"{sum(stage.transfers.values()):.3f} s", _links(plan)],
        ["sending, hidden", f"{stage.hidden_transfers:.3f} s", "beside the computation"],
        ["the host waits", f"{stage.host_waits:.3f} s", f"assumed {assumed.host_wait_seconds * 1e6:g} us each"],
    ]
    if plan.layout.pipeline > 1:
        rows.append(["pipeline's bubble", f"{estimate.bubble:.1%}", _bubble(plan)])
    rows += [
        ["tokens per second", f"{estimate.tokens_per_second:,.0f}", ""],
        ["MFU by 6N", f"{estimate.mfu:.1%}", f"of {hardware.bf16_tflops:g} TFLOP/s, the peak in bf16"],
        ["MFU with attention", f"{estimate.mfu_with_attention:.1%}", "the causal half of the scores"],
        ["the whole run", f"{estimate.days:,.1f} days", f"{plan.layout.steps:,} steps, without stops"],
        ["its cost", f"${estimate.dollars:,.0f}", f"assumed ${hardware.dollars_per_gpu_hour:g} per GPU-hour"],
    ]
    notes = []
    if plan.run.parallel.overlap_moe_expert_parallel_comm:
        notes.append(
            "overlap_moe_expert_parallel_comm: forward and backward passes are counted one after the other, and "
            "nothing hides the exchange of the experts' rows"
        )
    return Table(f"Estimated: a step takes {estimate.step_seconds:.2f} s", ["what", "estimate", "from"], rows, notes)


def name(one: Rehearsal, world: Sequence[Rehearsal]) -> str:
    return f"{one.rank} of {one.world}" if len(world) > 1 else "all"


def _bubble(plan: Plan) -> str:
    message = plan.stage(plan.slowest).seconds.message
    return (
        f"the busiest stage waits for others, in the order of Megatron's schedule, messages of {message * 1e3:.2g} ms"
    )


def _rates(plan: Plan) -> str:
    assumed, precision = plan.hardware.assumed, plan.run.precision
    return (
        f"{assumed.shares_from}: {assumed.matmul:.0%} of the peak in {precision} in matmuls, "
        f"{assumed.attention:.0%} in attention, {assumed.memory:.0%} of the memory's rate; "
        f"assumed: {assumed.kernel_seconds * 1e6:g} us a kernel"
    )


def _links(plan: Plan) -> str:
    assumed = plan.hardware.assumed
    return (
        f"assumed {assumed.nvlink:.0%} of NVLink, {assumed.network:.0%} of the network, "
        f"{assumed.transfer_seconds * 1e6:g} us at least"
    )
