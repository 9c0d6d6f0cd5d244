"""Which backend `model.expert_backend` means on this device."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

import torch

from jetmoe_megatron.config.schema import Model
from jetmoe_megatron.errors import UserError

INSTALL = "bash scripts/install_gpu.sh"
HOPPER = (9, 0)
BLACKWELL = (10, 0)


@dataclass(frozen=True)
class Choice:
    name: str
    why: str


def choose_backend(model: Model, precision: str) -> Choice:
    """
    Raises:
        UserError: if a backend was asked for by name and cannot serve on this device or these shapes.
    """
    name = model.expert_backend
    if name != "auto":
        if reason := why_not(name, model, precision):
            raise UserError(f"model.expert_backend: {name} {reason}")
        return Choice(name, "asked for")
    elsewhere = torch.cuda.is_available() and _capability() != HOPPER
    for name in ("te", "megablocks") if elsewhere else ():
        if why_not(name, model, precision) is None:
            return Choice(name, "torch's grouped_mm has one kernel for all experts on Hopper only")
    if reason := why_not("torch", model, precision):
        return Choice("loop", f"torch {reason}")
    if elsewhere:
        return Choice("torch", "neither te nor megablocks can serve")
    return Choice("torch", "torch's grouped_mm needs no package here and no counts on the host")


def why_not(name: str, model: Model, precision: str) -> str | None:
    """The reason why a backend cannot serve and what to do, as the end of a sentence; None if it can."""
    if name == "loop":
        return None
    if name != "torch":
        if not torch.cuda.is_available():
            return "needs a GPU, and there is none: use auto, torch or loop"
        # megablocks' matmul takes nothing else (grouped_gemm.cu:480), and fp32 is TF32 to Transformer Engine
        if precision != "bf16":
            return f"needs precision: bf16, not {precision}: change it, or use auto, torch or loop"
        if name == "te_fp8" and _capability() < HOPPER:
            return "needs a Hopper GPU or a newer one: use te"
        if reason := _missing(name):
            return reason
    elif torch.cuda.is_available() and _capability() >= BLACKWELL and precision == "bf16":
        # https://github.com/pytorch/pytorch/issues/172439
        return "gives experts without a token wrong gradients on this GPU: use auto, te, megablocks or loop"
    # grouped_mm wants strides of 16 bytes (torch/aten/src/ATen/native/GroupedMMUtils.h), fp8 matmuls 16 columns.
    multiple = {"torch": 8 if precision == "bf16" else 4, "te_fp8": 16}.get(name, 8)
    widths = {
        "hidden_size": model.hidden_size,
        "num_kv_heads x kv_channels": model.num_kv_heads * model.kv_channels,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    uneven = [f"{key} ({width})" for key, width in widths.items() if width % multiple]
    if uneven:
        return f"needs widths that are multiples of {multiple} in {precision}; {', '.join(uneven)} is not: use loop"
    return None


def _missing(name: str) -> str | None:
    package, option = {"megablocks": ("megablocks.ops", "--megablocks")}.get(
        name, ("transformer_engine.pytorch", "--te")
    )
    modules = [package, "grouped_gemm"] if name == "megablocks" else [package]
    try:
        for module in modules:
            importlib.import_module(module)
    except (ImportError, OSError) as error:  # a shared library that is not there is an OSError
        return f"cannot be imported ({str(error).splitlines()[0]}): {INSTALL} {option}, or use auto, torch or loop"
    return None


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability(int(os.environ.get("LOCAL_RANK", "0")))
