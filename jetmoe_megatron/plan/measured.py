"""Shares of a GPU's peak rates, from a step that was measured on it instead of assumed."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from data_tools.parallel import WorkerProcesses
from jetmoe_megatron.config.hardware import Hardware
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.load import load_file
from jetmoe_megatron.config.schema import Positive, Run, Section
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.plan.estimate import estimate
from jetmoe_megatron.plan.plan import make_plan
from jetmoe_megatron.plan.rehearsal import Rehearsal

_NEAR = 1e-4  # of the measured seconds


class MeasuredStep(Section):
    """What `python -m benchmarks.gpu_step` wrote as JSON: a step of one GPU, with torch's grouped matmuls."""

    gpu: str = Field(min_length=1)
    """As CUDA names it."""
    origin: str
    """Command, commit, date and versions."""
    run: Run
    micro_batches: Positive
    seconds: float = Field(gt=0)
    """Of a step."""
    peak_bytes: int | None = Field(None, ge=0)
    """Of tensors, as the allocator counted them."""


def with_measured_shares(hardware: Hardware, file: Path, processes: WorkerProcesses) -> Hardware:
    """The hardware with the shares with which a rehearsal of the measured step takes as long as that did.

    One factor changes the shares of matmuls, attention and memory alike. What a kernel, a transfer or a wait takes at
    least stays as assumed.

    Raises:
        UserError: the file is of another GPU, or its step was shorter than any shares allow.
    """
    measured = load_file(file, MeasuredStep)
    if hardware.gpu.split()[0].lower() not in measured.gpu.lower():
        raise UserError(f"--measured: {file} was measured on {measured.gpu}, which is no {hardware.gpu}")
    batch = measured.run.batch
    tokens = batch.sequence_length * batch.micro_sequences * measured.micro_batches
    run = measured.run.model_copy(update={"batch": batch.model_copy(update={"global_tokens": tokens})})
    (rehearsal,) = make_plan(run, 1, hardware, processes=processes).world
    factor = _factor(run, hardware, rehearsal, measured.seconds, file)
    source = f"measured, {measured.origin}"
    if measured.peak_bytes:
        held = max(sum(peak.values()) for peak in (rehearsal.memory.peak, rehearsal.memory.peak_in_update))
        source += f"; its tensors held {measured.peak_bytes / 1e9:.2f} GB, and {held / 1e9:.2f} GB in the rehearsal"
    scaled = _scaled(hardware, factor)
    return scaled.model_copy(update={"assumed": scaled.assumed.model_copy(update={"shares_from": source})})


def _factor(run: Run, hardware: Hardware, rehearsal: Rehearsal, seconds: float, file: Path) -> float:
    layout = resolve_layout(run, 1)
    shares = hardware.assumed
    low, high = 1e-6, 1 / max(shares.matmul, shares.attention, shares.memory)

    def takes(factor: float) -> float:
        return estimate(run, layout, _scaled(hardware, factor), [rehearsal]).step_seconds

    if not takes(high) <= seconds <= takes(low):
        raise UserError(
            f"--measured: {file}: a step of {seconds:g} s cannot be: at the peak rates of {hardware.gpu} and with what "
            f"is assumed of kernels it takes {takes(high):.4g} s"
        )
    while high - low > _NEAR * high:
        middle = (low + high) / 2
        low, high = (middle, high) if takes(middle) > seconds else (low, middle)
    return high


def _scaled(hardware: Hardware, factor: float) -> Hardware:
    own = hardware.assumed
    shares = {"matmul": own.matmul * factor, "attention": own.attention * factor, "memory": own.memory * factor}
    return hardware.model_copy(update={"assumed": own.model_copy(update=shares)})
