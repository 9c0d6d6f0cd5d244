"""Which ranks could not work with the others at all: found while they meet, before they would wait for each other."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch

from jetmoe_megatron.doctor.findings import Finding
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.runtime.device import has_gpu
from jetmoe_megatron.runtime.machine import Machine
from jetmoe_megatron.runtime.promised_gpus import check_device

_UNUSABLE = "no GPU that can be used"


def why_unusable(device: Literal["auto", "cuda", "cpu"]) -> str | None:
    """The reason why this rank cannot compute on what it should; None if it can."""
    try:
        check_device(device)
        if has_gpu():
            ones = torch.ones(256, 256, device=f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
            if not bool((ones @ ones == 256).all()):
                return "a matmul gives a wrong product"
    except UserError as error:
        return str(error)
    except RuntimeError as error:  # of the driver or the GPU
        return f"a matmul fails: {str(error).splitlines()[0]}"
    return None


def unusable(reason: str) -> str:
    """What a rank with this reason says as the name of its device."""
    return f"{_UNUSABLE} ({reason})"


def cannot_join(machines: Sequence[tuple[str, Machine]]) -> list[Finding]:
    """machines: the node of each rank, and what it runs on.

    CPUs and GPUs have no connections in common, and NCCL refuses another version of itself.
    """
    kinds = [_kind(machine) for _, machine in machines]
    usable = Counter(kind for kind in kinds if kind != _UNUSABLE)
    findings = []
    for rank, ((node, machine), kind) in enumerate(zip(machines, kinds, strict=True)):
        if kind == _UNUSABLE:
            findings.append(Finding(f"rank {rank} on {node}", machine.device, node))
        elif kind != (usual := usable.most_common(1)[0])[0]:
            what = f"it has {kind}, {usual[1]} of {len(kinds)} ranks have {usual[0]}: it cannot connect to them"
            findings.append(Finding(f"rank {rank} on {node}", what, node))
    return findings


def _kind(machine: Machine) -> str:
    if machine.device.startswith(_UNUSABLE):
        return _UNUSABLE
    return "a CPU" if machine.device == "CPU" else f"a GPU with NCCL {machine.NCCL}"
