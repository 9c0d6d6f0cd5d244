"""What a hardware file may say: the GPUs of a plan, and how much of their speed the plan assumes to be used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import Field

from jetmoe_megatron.config.load import load_file
from jetmoe_megatron.config.schema import Positive, Precision, Section
from jetmoe_megatron.errors import UserError

KNOWN = Path(__file__).resolve().parents[2] / "configs/hardware"
_Amount = Annotated[float, Field(ge=1e-9, le=1e9)]
_Share = Annotated[float, Field(ge=1e-6, le=1)]


class Assumed(Section):
    """Shares of the peak rates that a program reaches, and fixed costs. None of them is a measurement of this program
    unless the file says so."""

    matmul: _Share = 0.6
    """Share of the peak in matmuls."""
    attention: _Share = 0.5
    """Share of the peak in attention scores."""
    memory: _Share = 0.75
    """Share of `memory_tb_per_second` in operations that compute little."""
    nvlink: _Share = 0.75
    """Share of `nvlink_gb_per_second`."""
    network: _Share = 0.75
    """Share of `network_gbit_per_second`."""
    shares_from: str = "assumed"
    """What a plan says of the shares of matmuls, attention and memory: where they come from."""
    kernel_seconds: float = Field(4e-6, ge=0, le=1)
    """The least time of a kernel."""
    host_wait_seconds: float = Field(2e-5, ge=0, le=1)
    """What a wait of the host for the GPU costs."""
    transfer_seconds: float = Field(2e-5, ge=0, le=1)
    """The least time of a collective or a message."""
    reserved_gb: float = Field(2.0, ge=0, le=1e6)
    """Memory of a GPU that no tensor gets: contexts of CUDA and NCCL, and workspaces."""
    fragmentation: float = Field(0.05, ge=0, lt=1)
    """Memory that the allocator loses between tensors, as a share of theirs."""


class Hardware(Section):
    """GPUs, how they are connected, and what they cost."""

    gpu: str = Field(pattern=r"\S")
    """Name of the GPU."""
    bf16_tflops: _Amount
    """Peak of dense matmuls in bf16, in 10^12 operations per second."""
    fp32_tflops: _Amount
    """The same in fp32, without TF32, which no run uses."""
    memory_gb: _Amount
    """Memory, in 10^9 bytes."""
    memory_tb_per_second: _Amount
    """Peak rate of the memory, in 10^12 bytes per second."""
    nvlink_gb_per_second: _Amount
    """Peak rate between GPUs of a node, of one GPU and in one direction, in 10^9 bytes per second."""
    network_gbit_per_second: _Amount
    """Peak rate of the network of a node, in one direction, in 10^9 bits per second."""
    gpus_per_node: Positive
    """GPUs of a node."""
    dollars_per_gpu_hour: float = Field(ge=0, le=1e6)
    """Price of a GPU for an hour."""
    assumed: Assumed = Assumed()

    def tflops(self, precision: Precision) -> float:
        return self.bf16_tflops if precision == "bf16" else self.fp32_tflops


def load_hardware(path: Path) -> Hardware:
    """Raises UserError: one line that names the file and the key."""
    return load_file(path, Hardware)


def find_hardware(name: str) -> Hardware:
    """Of a GPU in `KNOWN`, or of a hardware file.

    Raises:
        UserError: one line that names `--hardware`, or the file and the key.
    """
    known = sorted(path.stem for path in KNOWN.glob("*.yaml"))
    if name in known:
        return load_hardware(KNOWN / f"{name}.yaml")
    if re.fullmatch(r"\w+", name):
        raise UserError(f"--hardware: {name!r} is not known: {', '.join(known)}, or a YAML file with its rates")
    return load_hardware(Path(name))
