"""Which backend `model.expert_backend` means on this device, for the widths that a rank has in this layout."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

import torch

from jetmoe_megatron.config.expert_backends import EXPERT_BACKENDS, HOPPER
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError

INSTALL = "bash scripts/install_gpu.sh"
BLACKWELL = (10, 0)


@dataclass(frozen=True)
class Choice:
    name: str
    why: str


def choose_backend(run: Run, layout: Layout) -> Choice:
    """
    Raises:
        UserError: if the run file names a backend that cannot serve on this device or for these shapes.
    """
    name = run.model.expert_backend
    if name != "auto":
        if reason := why_not(name, run, layout):
            raise UserError(f"model.expert_backend: {name} {reason}")
        return Choice(name, "asked for")
    elsewhere = torch.cuda.is_available() and _capability() != HOPPER
    for name in ("te", "megablocks") if elsewhere else ():
        if why_not(name, run, layout) is None:
            return Choice(name, "torch's grouped_mm has one kernel for all experts on Hopper only")
    if reason := why_not("torch", run, layout):
        return Choice("loop", f"torch {reason}")
    if elsewhere:
        return Choice("torch", "neither te nor megablocks can serve")
    return Choice("torch", "torch's grouped_mm needs no package here and no counts on the host")


def why_not(name: str, run: Run, layout: Layout) -> str | None:
    """The reason why a backend cannot serve and what to do, as the end of a sentence; None if it can."""
    backend, precision = EXPERT_BACKENDS[name], run.precision
    if backend.capability is not None and not torch.cuda.is_available():
        return "needs a GPU, and there is none: use auto, torch or loop"
    if precision not in backend.width_multiple:
        needed = " or ".join(backend.width_multiple)
        return f"needs precision: {needed}, not {precision}: change it, or use auto, torch or loop"
    if backend.capability is not None and _capability() < backend.capability:
        major, minor = backend.capability
        return f"needs a GPU of CUDA capability {major}.{minor} or newer: use auto, torch or loop"
    if reason := _missing(name):
        return reason
    if name == "torch" and precision == "bf16" and torch.cuda.is_available() and _capability() >= BLACKWELL:
        # https://github.com/pytorch/pytorch/issues/172439
        return "gives experts without a token wrong gradients on this GPU: use auto, te, megablocks or loop"
    multiple = backend.width_multiple[precision]
    uneven = [shown for shown, width in _widths(run, layout).items() if width % multiple]
    if uneven:
        return f"needs widths that are multiples of {multiple} in {precision}; {', '.join(uneven)} is not: use loop"
    return None


def _widths(run: Run, layout: Layout) -> dict[str, int]:
    """The widths of one rank's matmuls, for both kinds of experts, by the keys of the run file that they come from.

    Splitting experts over ranks (`parallel.expert`, `attention_experts`) does not change their widths.
    """
    model = run.model
    wholes = {
        "hidden_size": (model.hidden_size, "", 1),
        "num_kv_heads x kv_channels": (model.num_kv_heads * model.kv_channels, "tensor", layout.tensor),
        "ffn_hidden_size": (model.ffn_hidden_size, "expert_tensor", layout.expert_tensor),
    }
    widths = {}
    for key, (whole, by, ranks) in wholes.items():
        share = whole // ranks
        widths[f"{key} ({whole})" if ranks == 1 else f"{key} / {by} ({whole} / {ranks} = {share})"] = share
    return widths


def _missing(name: str) -> str | None:
    backend = EXPERT_BACKENDS[name]
    try:
        for module in backend.packages:
            importlib.import_module(module)
    except (ImportError, OSError) as error:  # a missing shared library is an OSError
        reason = str(error).splitlines()[0]
        return f"cannot be imported ({reason}): {INSTALL} {backend.install}, or use auto, torch or loop"
    return None


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")))
