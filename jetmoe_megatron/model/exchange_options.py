"""How the experts' rows are exchanged: from the run file to Megatron-Core's options, and what they need.

Which of them go together is checked in `config/layout.py`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from typing import Any

from jetmoe_megatron.config.expert_backends import EXPERT_BACKENDS
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError

_NOTHING_SPECIAL = {"moe_token_dispatcher_type": "alltoall"}
_SWITCHES = (
    "overlap_moe_expert_parallel_comm",
    "delay_wgrad_compute",
    "overlap_dispatch_backward_with_experts_wgrad",
    "high_priority_a2a_comm_stream",
)
# The function of transformer/moe/fused_a2a.py that is None, or not there, without the library; and what provides it.
_LIBRARIES = {
    "deepep": ("fused_dispatch", "DeepEP"),
    "hybridep": ("hybrid_ep_dispatch", "the hybrid-ep branch of DeepEP"),
    "ncclep": ("nccl_ep_dispatch", "a Transformer Engine with NCCL EP"),
}


def exchange_options(run: Run) -> dict[str, Any]:
    """Arguments of Megatron's TransformerConfig. Switches that are off are left out: this version may lack them."""
    options: dict[str, Any] = {key: True for key in _SWITCHES if getattr(run.parallel, key)}
    if run.parallel.moe_token_dispatcher == "alltoall":
        return {**options, **_NOTHING_SPECIAL}
    return {
        **options,
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": run.parallel.moe_token_dispatcher,
    }


def check_exchange(run: Run, expert_backend: str) -> None:
    """Raises UserError if this machine lacks something that an option needs."""
    if exchange_options(run) == _NOTHING_SPECIAL:
        return
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe import fused_a2a
    from megatron.core.utils import is_te_min_version

    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    for key in _SWITCHES:
        if getattr(run.parallel, key) and key not in known:
            raise UserError(f"parallel.{key}: {_newer()}")
    dispatcher = run.parallel.moe_token_dispatcher
    if dispatcher in _LIBRARIES:
        function, library = _LIBRARIES[dispatcher]
        if not hasattr(fused_a2a, function):
            raise UserError(f"parallel.moe_token_dispatcher: {dispatcher} {_newer()}")
        if getattr(fused_a2a, function) is None:
            raise UserError(
                f"parallel.moe_token_dispatcher: {dispatcher} needs {library}, which is not installed "
                "(docs/install.md), or use alltoall"
            )
    alone = "overlap_dispatch_backward_with_experts_wgrad"
    if getattr(run.parallel, alone) and not is_te_min_version("2.3.0"):  # TransformerConfig asserts it
        raise UserError(
            f"parallel.{alone}: needs Transformer Engine: bash scripts/install_gpu.sh --te, or set it to false"
        )
    for key in ("delay_wgrad_compute", alone):
        if getattr(run.parallel, key) and not EXPERT_BACKENDS[expert_backend].delays_weight_gradient:
            raise UserError(f"parallel.{key}: needs model.expert_backend: torch or loop, not {expert_backend}")


def _newer() -> str:
    installed = importlib.metadata.version("megatron-core")
    return f"needs Megatron-Core 0.19 or newer, which needs Python 3.12; {installed} is installed"
