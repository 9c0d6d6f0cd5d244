"""Rehearses a whole world: one rank for all that do the same."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.plan.rehearsal import Rehearsal
from jetmoe_megatron.plan.rehearse import Device, rehearse


def rehearse_world(run: Run, layout: Layout, device: Device = "gpu", imbalance: float = 1.0) -> list[Rehearsal]:
    """In pipeline order, in a process for each core that this one may use.

    Raises:
        UserError: if the run needs a package that computes on GPUs only.
    """
    check_can_rehearse(run)
    ranks = distinct_ranks(layout, imbalance)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(len(ranks), len(os.sched_getaffinity(0))), mp_context=context) as processes:
        return list(processes.map(partial(rehearse, run, layout, device=device, imbalance=imbalance), ranks))


def check_can_rehearse(run: Run) -> None:
    """Raises UserError if the run needs a package that computes on GPUs only."""
    if run.parallel.context > 1:
        raise UserError("parallel.context: a ring exchange of Transformer Engine cannot be rehearsed: set it to 1")
    if run.parallel.moe_token_dispatcher != "alltoall":
        raise UserError("parallel.moe_token_dispatcher: only alltoall can be rehearsed")


def distinct_ranks(layout: Layout, imbalance: float) -> list[int]:
    """The first rank of each pipeline stage; if experts are on several ranks and not equally full, also the one with
    the second fullest."""
    stage = layout.world // layout.pipeline  # Megatron's order: ranks of a stage follow each other
    offsets = [0, layout.expert_tensor] if imbalance > 1.0 and layout.expert > 1 else [0]
    return [number * stage + offset for number in range(layout.pipeline) for offset in offsets]
