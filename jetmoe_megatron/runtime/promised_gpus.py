"""Does this machine promise a GPU that torch does not see? Then its driver or its torch is broken."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from jetmoe_megatron.errors import UserError

_SLURM = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")
_NO_DEVICES = ("", "-1", "NoDevFiles")  # what users and SLURM write to hide all GPUs


def check_device(device: Literal["auto", "cuda", "cpu"]) -> None:
    """
    Raises:
        UserError: a GPU is asked for or promised, and torch sees none.
    """
    if device == "cpu" or torch.cuda.is_available():
        return
    if device == "cuda":
        raise UserError(f"device: cuda, but torch sees no GPU: {_why()}")
    if promise := promise_of_gpus(os.environ):
        raise UserError(f"device: {promise}, but torch sees no GPU: {_why()}. To train on the CPU, set it to cpu")


def promise_of_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> str | None:
    """What says that there are GPUs, as the beginning of a sentence; None if nothing does."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible in _NO_DEVICES:
        return None
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible}"
    if name := next((name for name in _SLURM if environment.get(name, "0") not in ("", "0")), None):
        return f"{name} is {environment[name]}"
    if file := next(iter(sorted(devices.glob("nvidia[0-9]*"))), None):
        return f"{file} is there"
    return None


def _why() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "does `nvidia-smi` work on this node?"
