"""Does each rank have enough memory? From the plan's rehearsal of a step, on the device that a start would use."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from data_tools.printing import printable
from data_tools.text_table import table
from data_tools.units import shown
from jetmoe_megatron.config.hardware import Assumed, Hardware, find_hardware
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.plan.estimate import bytes_needed, estimate
from jetmoe_megatron.plan.plan import Plan, make_plan
from jetmoe_megatron.plan.rehearsal import Rehearsal
from jetmoe_megatron.plan.world import rehearse_world
from jetmoe_megatron.runtime.device import has_gpu
from jetmoe_megatron.runtime.memory import available_memory, own_memory


def memory(run: Run, layout: Layout, hardware: Hardware | None, elsewhere: bool) -> Iterator[str]:
    """
    Args:
        hardware: of the ranks; None: this machine's, or an unknown one.
        elsewhere: whether the ranks are on other machines.
    """
    try:
        if hardware is not None:
            yield from _verdict(make_plan(run, layout.world, hardware), f"of an {hardware.gpu}")
        elif run.device != "cpu" and has_gpu():
            here = torch.cuda.get_device_properties(0)
            known = _of_this_machine(here.name, here.total_memory)
            yield from _verdict(make_plan(run, layout.world, known), f"of this machine's {here.name}")
        elif run.device == "cpu" or not elsewhere:
            yield from _on_the_cpu(run, layout)
        else:
            yield from _without_verdict(rehearse_world(run, layout))
    except UserError as error:
        yield printable(f"memory: not known, because this run cannot be rehearsed: {error}")
