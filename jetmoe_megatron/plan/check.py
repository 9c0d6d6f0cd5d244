"""What no rehearsal is needed for to refuse a plan."""

from __future__ import annotations

from data_tools.units import shown
from jetmoe_megatron.config.describe import count_parameters
from jetmoe_megatron.config.hardware import Hardware
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError


def check_can_rehearse(run: Run) -> None:
    """Raises UserError if the run needs a package that computes on GPUs only."""
    if run.parallel.context > 1:
        raise UserError("parallel.context: a ring exchange of Transformer Engine cannot be rehearsed: set it to 1")
    if run.parallel.moe_token_dispatcher != "alltoall":
        raise UserError("parallel.moe_token_dispatcher: only alltoall can be rehearsed")


def check_size(run: Run, gpus: int, hardware: Hardware) -> None:
    """Raises UserError if the weights do not fit so many GPUs under any layout."""
    total, _ = count_parameters(run.model)
    each = total * (2 if run.precision == "bf16" else 4) / gpus
    if each > hardware.memory_gb * 1e9:
        raise UserError(
            f"model: {total / 1e9:,.3g}B parameters are {shown(each, 'B')} of weights for each of {gpus:,} GPUs, "
            f"however they are divided, and a GPU has {shown(hardware.memory_gb * 1e9, 'B')}: take a smaller model"
        )
