"""What a rank runs on.

Ranks with another device would wait for each other without end (gloo among NCCL). With other versions they may compute
something else.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

CUDNN_FOR_HOPPER = 91500  # the version from which torch takes cuDNN's attention kernel there
_DRIVER = Path("/sys/module/nvidia/version")


@dataclass(frozen=True)
class Machine:
    """An empty text: it is not there, or not used on this device."""

    device: str  # "NVIDIA H100 80GB HBM3", or "CPU"
    driver: str
    torch: str
    CUDA: str
    NCCL: str
    cuDNN: str
    Megatron_Core: str
    Transformer_Engine: str

    def __str__(self) -> str:
        return ", ".join(f"{spelled(name)} {value}" for name, value in asdict(self).items() if value)


def this_machine(broken: str = "") -> Machine:
    """On a GPU: after the rank has chosen its own.

    broken: said instead of the device, if its GPU cannot even be asked for its name.
    """
    gpu = not broken and torch.cuda.is_available()
    return Machine(
        device=broken or (torch.cuda.get_device_name() if gpu else "CPU"),
        driver=_DRIVER.read_text().strip() if gpu and _DRIVER.exists() else "",
        torch=torch.__version__,
        CUDA=(torch.version.cuda or "") if gpu else "",
        NCCL=".".join(map(str, torch.cuda.nccl.version())) if gpu else "",
        cuDNN=str(torch.backends.cudnn.version() or "") if gpu else "",
        Megatron_Core=version_of("megatron-core"),
        Transformer_Engine=version_of("transformer-engine"),
    )


def first_difference(machines: Sequence[tuple[str, Machine]]) -> str | None:
    """machines: (host, what it runs on) of each rank. Returns a line that names a rank, or None if all are alike."""
    host_0, first = machines[0]
    for rank, (host, machine) in enumerate(machines):
        for name, value in asdict(machine).items():
            if value != (expected := asdict(first)[name]):
                return (
                    f"{spelled(name)}: rank {rank} on {host} has {value or 'none'}, rank 0 on {host_0} has "
                    f"{expected or 'none'}: all ranks need the same"
                )
    return None


def spelled(name: str) -> str:
    """A field of `Machine` as people write it."""
    return name.replace("_Core", "-Core").replace("_", " ")


def version_of(package: str) -> str:
    """Empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
