"""A plan as text, with every assumption beside what follows from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from data_tools.text_table import table
from data_tools.units import shown
from jetmoe_megatron.config.describe import count_parameters, describe_layout
from jetmoe_megatron.plan.estimate import bytes_needed, transfer_seconds
from jetmoe_megatron.plan.plan import Plan
from jetmoe_megatron.plan.rehearsal import Rehearsal


def text(plan: Plan) -> str:
    return "\n".join([*_head(plan), "", *_memory(plan), *_work(plan), *_sent(plan), *_time(plan)])


def _head(plan: Plan) -> Iterator[str]:
    run, layout, hardware = plan.run, plan.layout, plan.hardware
    total, active = count_parameters(run.model)
    nodes = -(-layout.world // hardware.gpus_per_node)
    yield f"{run.name}: {total / 1e9:,.2f}B parameters, {active / 1e9:,.2f}B active, {run.precision}"
    yield f"on {layout.world} {hardware.gpu}, {nodes} nodes: {describe_layout(layout)}"
    yield (
        f"{layout.micro_batches} micro-batches of {run.batch.micro_sequences} x {run.batch.sequence_length} tokens; "
        f"the fullest expert gets {plan.imbalance:g} times the mean"
    )
    yield "All figures are computed from a rehearsal of the program. None is a measurement."


def _memory(plan: Plan) -> Iterator[str]:
    assumed = plan.hardware.assumed
    yield f"Memory: {plan.verdict}. {plan.left:.0%} of {plan.hardware.memory_gb:g} GB are left on the fullest GPU."
    kinds = list(dict.fromkeys(kind for one in plan.world for kind in one.memory.peak))
    rows = []
    for one in plan.world:
        held = [shown(one.memory.peak.get(kind, 0), "B") for kind in kinds]
        rows.append([_name(one, plan.world), *held, shown(bytes_needed(plan.hardware, one), "B")])
    yield from table(["rank", *kinds, "needed"], rows)
    yield f"  needed: the most that is held at once, assumed {assumed.fragmentation:.0%} that the allocator loses"
    yield f"  between tensors, and assumed {assumed.reserved_gb:g} GB for CUDA, NCCL and workspaces"
    yield ""


def _work(plan: Plan) -> Iterator[str]:
    yield "Computed in a step, by the slowest rank:"
    slowest = plan.slowest
    flops, stage = slowest.flops(), plan.stage(slowest)
    numbers: dict[str, int] = defaultdict(int)
    for kernels in slowest.kernels:
        numbers[kernels.part] += kernels.number
    rows = [
        [part, shown(flops[part], "FLOP") if part in flops else "", f"{numbers[part]:,}", f"{seconds:.3f} s"]
        for part, seconds in sorted(stage.compute.items(), key=lambda item: -item[1])
    ]
    yield from table(["part", "FLOPs", "kernels", "time"], rows)


def _sent(plan: Plan) -> Iterator[str]:
    yield "Sent in a step, by the slowest rank:"
    rows: dict[tuple[str, str, str], list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for transfers in plan.slowest.transfers:
        nodes = {rank // plan.hardware.gpus_per_node for rank in transfers.ranks}
        row = rows[transfers.group, transfers.kind, "NVLink" if len(nodes) == 1 else "network"]
        row[0] += transfers.number
        row[1] += transfers.number * transfers.bytes
        row[2] += transfers.number * transfer_seconds(transfers, plan.hardware)
    cells = [
        [*key, f"{number:,.0f}", shown(size, "B"), f"{seconds:.3f} s"] for key, (number, size, seconds) in rows.items()
    ]
    yield from table(["group", "what", "link", "number", "bytes", "time alone"], cells)


def _time(plan: Plan) -> Iterator[str]:
    estimate, hardware, assumed = plan.estimate, plan.hardware, plan.hardware.assumed
    stage = plan.stage(plan.slowest)
    yield f"Estimated: a step takes {estimate.step_seconds:.2f} s"
    rows = [
        ["computing", f"{sum(stage.compute.values()):.3f} s", _rates(plan)],
        ["sending, not hidden", f"{sum(stage.transfers.values()):.3f} s", _links(plan)],
        ["sending, hidden", f"{stage.hidden_transfers:.3f} s", "beside the computation"],
        ["the host waits", f"{stage.host_waits:.3f} s", f"assumed {assumed.host_wait_seconds:g} s each"],
        ["pipeline's bubble", f"{estimate.bubble:.1%}", "from the schedule: stages wait at both ends of a step"],
        ["tokens per second", f"{estimate.tokens_per_second:,.0f}", ""],
        ["MFU by 6N", f"{estimate.mfu:.1%}", f"of {hardware.bf16_tflops:g} TFLOP/s"],
        ["MFU with attention", f"{estimate.mfu_with_attention:.1%}", "the causal half of the scores"],
        ["the whole run", f"{estimate.days:,.1f} days", f"{plan.layout.steps:,} steps, without stops"],
        ["", f"${estimate.dollars:,.0f}", f"assumed ${hardware.dollars_per_gpu_hour:g} per GPU-hour"],
    ]
    yield from table(["what", "estimate", "from"], rows)


def _rates(plan: Plan) -> str:
    assumed = plan.hardware.assumed
    return (
        f"{assumed.shares_from}: {assumed.matmul:.0%} of the peak in matmuls, {assumed.attention:.0%} in attention, "
        f"{assumed.memory:.0%} of the memory's rate; assumed: {assumed.kernel_seconds * 1e6:g} us a kernel"
    )


def _links(plan: Plan) -> str:
    assumed = plan.hardware.assumed
    return f"assumed {assumed.nvlink:.0%} of NVLink, {assumed.network:.0%} of the network"


def _name(one: Rehearsal, world: Sequence[Rehearsal]) -> str:
    return f"{one.rank} of {one.world}" if len(world) > 1 else "all"
