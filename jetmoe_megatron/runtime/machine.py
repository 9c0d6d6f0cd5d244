"""What each rank runs on, compared before the ranks join a process group.

Ranks with another device would wait for each other for ever (gloo among NCCL), and with other versions they would
compute something else.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
from dataclasses import asdict, dataclass

import torch
from torch.distributed import Store

from jetmoe_megatron.errors import SharedError


@dataclass(frozen=True)
class Machine:
    """An empty text: it is not there."""

    device: str  # "NVIDIA H100 80GB HBM3", or "CPU"
    driver: str
    torch: str
    cuda: str
    nccl: str
    cudnn: str
    megatron_core: str
    transformer_engine: str

    def __str__(self) -> str:
        device, *versions = asdict(self).items()
        named = [f"{name.replace('_', ' ')} {value}" for name, value in versions if value]
        return ", ".join([device[1], *named])


def this_machine() -> Machine:
    gpu = torch.cuda.is_available()
    return Machine(
        device=torch.cuda.get_device_name() if gpu else "CPU",
        driver=_driver() if gpu else "",
        torch=torch.__version__,
        cuda=(torch.version.cuda or "") if gpu else "",
        nccl=".".join(map(str, torch.cuda.nccl.version())) if gpu else "",
        cudnn=str(torch.backends.cudnn.version() or "") if gpu else "",
        megatron_core=_version("megatron-core"),
        transformer_engine=_version("transformer-engine"),
    )


def check_machines_are_alike(store: Store, rank: int, world: int) -> None:
    """Rank 0 compares what all ranks say; all ranks call it.

    Raises:
        SharedError: on all ranks, with the first difference.
    """
    store.set(f"machine/{rank}", json.dumps([platform.node(), asdict(this_machine())]))
    if rank == 0:
        said = [json.loads(store.get(f"machine/{other}")) for other in range(world)]
        store.set("machines", _first_difference(said) or "alike")
    if (verdict := store.get("machines").decode()) != "alike":
        raise SharedError(verdict)


def _first_difference(said: list[tuple[str, dict[str, str]]]) -> str | None:
    """said: (host, machine) of each rank."""
    host_0, first = said[0]
    for rank, (host, machine) in enumerate(said):
        for name, value in machine.items():
            if value != first[name]:
                what = name.replace("_", " ")
                return f"{what}: rank {rank} on {host} has {value or 'none'}, rank 0 on {host_0} has {first[name] or 'none'}"
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    """NVIDIA's driver, as its kernel module says."""
    try:
        with open("/sys/module/nvidia/version", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
