"""Rehearses a whole world: one rank for all that do the same."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import islice

from data_tools.parallel import WorkerProcesses
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.rehearsal import Rehearsal
from jetmoe_megatron.plan.rehearse import Device, kept_bytes, rehearse

Case = tuple[Run, Layout]
_Task = tuple[Run, Layout, int, Device, float]


def rehearsing_processes() -> WorkerProcesses:
    """One for each core that this process may use."""
    return WorkerProcesses(len(os.sched_getaffinity(0)))


def rehearse_world(
    run: Run, layout: Layout, device: Device = "gpu", imbalance: float = 1.0, processes: WorkerProcesses | None = None
) -> list[Rehearsal]:
    """In pipeline order.

    Args:
        processes: of `rehearsing_processes`, if they exist already.
    """
    if processes is None:
        with rehearsing_processes() as own:
            return rehearse_world(run, layout, device, imbalance, own)
    ranks = distinct_ranks(layout, imbalance)
    return list(processes.map(_rehearse, [(run, layout, rank, device, imbalance) for rank in ranks]))


def rehearse_ends(cases: Sequence[Case], imbalance: float, processes: WorkerProcesses) -> Iterator[list[Rehearsal]]:
    """For each case the ranks of the first and of the last stage on a GPU; all, if stages differ in their layers.

    Stages of the same number of layers need no more memory and time between the ends than the first does.
    """
    ends = [[rank for rank in distinct_ranks(case[1], imbalance) if _is_looked_at(rank, case)] for case in cases]
    tasks: list[_Task] = [
        (*case, rank, "gpu", imbalance) for case, ranks in zip(cases, ends, strict=True) for rank in ranks
    ]
    found = processes.map(_rehearse, tasks)
    for ranks in ends:
        yield list(islice(found, len(ranks)))


def kept_on_the_first_stage(cases: Sequence[Case], processes: WorkerProcesses) -> Iterator[int]:
    """Bytes that its ranks hold between steps, for each case: most of all stages, as it also has the embedding."""
    return processes.map(_kept, cases)


def _kept(case: Case) -> int:
    return kept_bytes(*case, rank=0)


def _rehearse(task: _Task) -> Rehearsal:
    return rehearse(*task)


def distinct_ranks(layout: Layout, imbalance: float) -> list[int]:
    """The first rank of each pipeline stage; if experts are on several ranks and not equally full, also the one with
    the second fullest."""
    stage = layout.world // layout.pipeline  # Megatron's order: ranks of a stage follow each other
    offsets = [0, layout.expert_tensor] if imbalance > 1.0 and layout.expert > 1 else [0]
    return [number * stage + offset for number in range(layout.pipeline) for offset in offsets]


def _is_looked_at(rank: int, case: Case) -> bool:
    run, layout = case
    stage = rank * layout.pipeline // layout.world
    return run.parallel.layers_per_stage is not None or stage in (0, layout.pipeline - 1)
