"""Does this machine promise a GPU that torch does not see? Then its driver or its torch is broken."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from jetmoe_megatron.errors import UserError, printable

_SLURM = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")
_HIDES_ALL = ("", "-1", "NoDevFiles")  # values of CUDA_VISIBLE_DEVICES; the last is SLURM's


def check_device(device: Literal["auto", "cuda", "cpu"]) -> None:
    """
    Raises:
        UserError: a GPU is asked for or promised, and torch sees none; or this rank is one too many for its node.
    """
    if device == "cpu":
        return
    if torch.cuda.is_available():
        rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if rank >= gpus:
            raise UserError(
                f"device: LOCAL_RANK is {rank}, but torch sees {gpus} GPU{'s' * (gpus > 1)}: start at most {gpus} "
                "ranks on this node"
            )
        return
    if device == "cuda":
        raise UserError(f"device: cuda, but torch sees no GPU: {_why(os.environ)}")
    if promise := promise_of_gpus(os.environ):
        why = f"{printable(promise)}, but torch sees no GPU: {_why(os.environ)}"
        raise UserError(f"device: {why}. To train on the CPU, set it to cpu")


def promise_of_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> str | None:
    """What says that there are GPUs, as the beginning of a sentence; None if nothing does."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible in _HIDES_ALL:
        return None
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES is {visible}"
    if name := next((name for name in _SLURM if environment.get(name, "") not in ("", "0")), None):
        return f"{name} is {environment[name]}"
    if file := next(iter(sorted(devices.glob("nvidia[0-9]*"))), None):
        return f"{file} is there"
    return None


def _why(environment: Mapping[str, str]) -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if environment.get("CUDA_VISIBLE_DEVICES") in _HIDES_ALL:
        return "CUDA_VISIBLE_DEVICES hides them"
    return "does `nvidia-smi` work on this node?"
