"""The plan of a run on some GPUs: what its rehearsal and the rates of the GPU say together. An estimate throughout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data_tools.parallel import WorkerProcesses
from jetmoe_megatron.config.hardware import Hardware
from jetmoe_megatron.config.layout import Layout, resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.estimate import Estimate, StageTime, bytes_needed, estimate
from jetmoe_megatron.plan.rehearsal import Rehearsal
from jetmoe_megatron.plan.world import Case, rehearse_ends, rehearse_world

Verdict = Literal["fits", "tight", "does not fit"]
TIGHT = 0.1  # share of the memory that should be left


@dataclass(frozen=True)
class Plan:
    """
    Attributes:
        world: a rank for all that do the same.
        estimate: if a step is like the rehearsed one.
    """

    run: Run
    layout: Layout
    hardware: Hardware
    imbalance: float
    world: list[Rehearsal]
    estimate: Estimate

    @property
    def fullest(self) -> Rehearsal:
        """The rank that needs most memory."""
        return max(self.world, key=lambda rehearsal: bytes_needed(self.hardware, rehearsal))

    @property
    def left(self) -> float:
        """Share of the fullest rank's memory that is left; below 0 if it does not fit."""
        return 1 - bytes_needed(self.hardware, self.fullest) / (self.hardware.memory_gb * 1e9)

    @property
    def verdict(self) -> Verdict:
        return "does not fit" if self.left < 0 else "tight" if self.left < TIGHT else "fits"

    @property
    def slowest(self) -> Rehearsal:
        """The rank that the others wait for."""
        return self.world[max(range(len(self.world)), key=lambda number: self.estimate.stages[number].busy)]

    def stage(self, rehearsal: Rehearsal) -> StageTime:
        return self.estimate.stages[self.world.index(rehearsal)]

    def tree(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "run": self.run.model_dump(mode="json"),
            "layout": dataclasses.asdict(self.layout),
            "hardware": self.hardware.model_dump(mode="json"),
            "imbalance": self.imbalance,
            "verdict": self.verdict,
            "memory_left": self.left,
            "bytes_needed": [bytes_needed(self.hardware, rehearsal) for rehearsal in self.world],
            "estimate": self.estimate.tree(),
            "ranks": [dataclasses.asdict(rehearsal) for rehearsal in self.world],
        }


def make_plan(
    run: Run, gpus: int, hardware: Hardware, imbalance: float = 1.0, processes: WorkerProcesses | None = None
) -> Plan:
    """
    Args:
        imbalance: rows of a layer's fullest expert, divided by the mean.
        processes: of `rehearsing_processes`, if they exist already.

    Raises:
        UserError: the layout does not fit the number of GPUs.
    """
    layout = resolve_layout(run, gpus)
    world = rehearse_world(run, layout, imbalance=imbalance, processes=processes)
    return Plan(run, layout, hardware, imbalance, world, estimate(run, layout, hardware, world))


def plan_ends(
    cases: Sequence[Case], hardware: Hardware, imbalance: float, processes: WorkerProcesses
) -> Iterator[Plan]:
    """Plans for which only what may be the fullest and the slowest stage was rehearsed (`rehearse_ends`)."""
    for (run, layout), world in zip(cases, rehearse_ends(cases, imbalance, processes), strict=True):
        yield Plan(run, layout, hardware, imbalance, world, estimate(run, layout, hardware, world))
