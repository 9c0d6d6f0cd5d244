"""Does each rank have enough memory? From the plan's rehearsal of a step, on the device that a start would use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch

from data_tools.printing import printable
from data_tools.text_table import table
from data_tools.units import shown
from jetmoe_megatron.config.hardware import Assumed, Hardware, find_hardware
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.plan.check import check_can_rehearse
from jetmoe_megatron.plan.estimate import bytes_needed, estimate
from jetmoe_megatron.plan.plan import Plan, make_plan
from jetmoe_megatron.plan.rehearsal import Rehearsal
from jetmoe_megatron.plan.world import rehearse_world
from jetmoe_megatron.runtime.device import has_gpu
from jetmoe_megatron.runtime.memory import available_memory, own_memory

_MOST_RANKS = 2**17


def memory(run: Run, layout: Layout, hardware: Hardware | None, elsewhere: bool) -> Iterator[str]:
    """
    Args:
        hardware: of the ranks; None: this machine's, or an unknown one.
        elsewhere: whether the ranks are on other machines.
    """
    try:
        if layout.world > _MOST_RANKS:
            raise UserError(f"{layout.world} ranks are too many to rehearse within minutes")
        check_can_rehearse(run)
        if hardware is not None:
            yield from _verdict(make_plan(run, layout.world, hardware), hardware.gpu)
        elif run.device != "cpu" and has_gpu():
            gpu = torch.cuda.get_device_properties(0)
            known = _of_this_machine(gpu.name, gpu.total_memory, Assumed())
            yield from _verdict(make_plan(run, layout.world, known), f"{gpu.name}, here")
        elif run.device == "cpu" or not elsewhere:
            yield from _on_the_cpu(run, layout)
        else:
            yield from _without_verdict(rehearse_world(run, layout))
    except UserError as error:
        yield f"memory: not rehearsed: {printable(str(error))}"


def _on_the_cpu(run: Run, layout: Layout) -> Iterator[str]:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", layout.world))
    assumed = Assumed(reserved_gb=own_memory() / 1e9)  # a rank has imported what this process has
    known = _of_this_machine("CPU", available_memory() / ranks, assumed)
    world = rehearse_world(run, layout, device="cpu")
    plan = Plan(run, layout, known, 1.0, world, estimate(run, layout, known, world))
    whom = "" if ranks == 1 else f" for each of {ranks} ranks"
    yield from _verdict(plan, f"available here{whom}", "Python and its packages")


def _of_this_machine(name: str, memory: float, assumed: Assumed) -> Hardware:
    """memory: in bytes. Its rates are another GPU's: what is said here does not depend on them."""
    return find_hardware("h100").model_copy(update={"gpu": name, "memory_gb": memory / 1e9, "assumed": assumed})


def _verdict(plan: Plan, whose: str, reserved: str = "CUDA, NCCL and workspaces") -> Iterator[str]:
    hardware, fullest = plan.hardware, plan.fullest
    needed, there = bytes_needed(hardware, fullest), hardware.memory_gb * 1e9
    left = f"{plan.left:.0%} are left" if plan.left >= 0 else f"{shown(needed - there, 'B')} are missing"
    needs = f"{_name(fullest)} needs {shown(needed, 'B')} of {shown(there, 'B')}"
    yield f"memory: {plan.verdict}: {needs} ({printable(whose)}); {left}"
    tensors, assumed = fullest.memory.most, hardware.assumed
    lost = sum(tensors.values()) * assumed.fragmentation
    yield from _kinds(
        {**tensors, "between tensors (assumed)": lost, f"{reserved} (assumed)": assumed.reserved_gb * 1e9}
    )


def _without_verdict(world: list[Rehearsal]) -> Iterator[str]:
    fullest = max(world, key=lambda rehearsal: sum(rehearsal.memory.most.values()))
    tensors = fullest.memory.most
    yield (
        f"memory: {_name(fullest)} holds at most {shown(sum(tensors.values()), 'B')} in tensors; --hardware NAME says "
        "whether they fit"
    )
    yield from _kinds(tensors)


def _kinds(sizes: Mapping[str, float]) -> Iterator[str]:
    yield from table(["when most is held", "computed, not measured"], [[k, shown(v, "B")] for k, v in sizes.items()])


def _name(rehearsal: Rehearsal) -> str:
    return "the rank" if rehearsal.world == 1 else f"the fullest rank ({rehearsal.rank} of {rehearsal.world})"
