"""The options of the exchange of the experts' rows: what reaches Megatron-Core, and what is refused where."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
from megatron.core.transformer import TransformerConfig

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.model.exchange_options import check_exchange, exchange_options
from tests.parallel.test_equal_to_one_process import run_tree

OVERLAP = {"expert": 2, "overlap_moe_expert_parallel_comm": True}
ALONE = "overlap_dispatch_backward_with_experts_wgrad"
HAS_0_19 = hasattr(TransformerConfig, ALONE)


def run_with(parallel: dict[str, Any], **changes: Any) -> Run:
    return Run.model_validate(run_tree(parallel=parallel, **{"precision": "bf16", **changes}))


@pytest.mark.parametrize(
    ("parallel", "options"),
    [
        ({}, {"moe_token_dispatcher_type": "alltoall"}),
        *(
            (
                {"expert": 2, "moe_token_dispatcher": library},
                {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": library},
            )
            for library in ("deepep", "hybridep", "ncclep")
        ),
        (
            {**OVERLAP, "delay_wgrad_compute": True},
            {
                "moe_token_dispatcher_type": "alltoall",
                "overlap_moe_expert_parallel_comm": True,
                "delay_wgrad_compute": True,
            },
        ),
        ({"expert": 2, ALONE: True}, {"moe_token_dispatcher_type": "alltoall", ALONE: True}),
        (
            {**OVERLAP, "high_priority_a2a_comm_stream": True},
            {
                "moe_token_dispatcher_type": "alltoall",
                "overlap_moe_expert_parallel_comm": True,
                "high_priority_a2a_comm_stream": True,
            },
        ),
    ],
)
def test_what_reaches_megatron(parallel: dict[str, Any], options: dict[str, Any]) -> None:
    run = run_with(parallel)
    resolve_layout(run, 2)
    assert exchange_options(run) == options


@pytest.mark.parametrize(
    ("parallel", "changes", "message"),
    [
        ({"moe_token_dispatcher": "deepep"}, {}, "moe_token_dispatcher: deepep needs parallel.expert > 1"),
        (
            {"expert": 2, "moe_token_dispatcher": "hybridep"},
            {"precision": "fp32"},
            "moe_token_dispatcher: hybridep needs precision: bf16",
        ),
        ({"expert": 2, "delay_wgrad_compute": True}, {}, "delay_wgrad_compute: needs parallel.overlap_moe_expert"),
        ({"expert": 2, "high_priority_a2a_comm_stream": True}, {}, "needs parallel.overlap_moe_expert_parallel_comm"),
        ({ALONE: True}, {}, f"{ALONE}: needs parallel.expert > 1"),
        ({**OVERLAP, ALONE: True}, {}, "does not go with overlap_moe_expert_parallel_comm"),
    ],
)
def test_options_that_do_not_go_together(parallel: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_layout(run_with(parallel, **changes), 2)


@pytest.mark.parametrize(
    ("parallel", "backend", "message"),
    [
        ({"expert": 2, "moe_token_dispatcher": "deepep"}, "torch", "deepep needs DeepEP, which is not installed"),
        ({"expert": 2, "moe_token_dispatcher": "hybridep"}, "torch", "hybridep needs the hybrid-ep branch of DeepEP"),
        (
            {"expert": 2, "moe_token_dispatcher": "ncclep"},
            "torch",
            "ncclep needs " + ("a Transformer Engine with NCCL EP" if HAS_0_19 else "Megatron-Core 0.19 or newer"),
        ),
        (
            {"expert": 2, ALONE: True},
            "torch",
            f"{ALONE}: needs " + ("Transformer Engine" if HAS_0_19 else "Megatron-Core 0.19 or newer"),
        ),
        ({**OVERLAP, "delay_wgrad_compute": True}, "te", "needs model.expert_backend: torch or loop, not te"),
    ],
)
def test_what_this_machine_lacks(parallel: dict[str, Any], backend: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_exchange(run_with(parallel), backend)


def test_an_older_version_is_named() -> None:
    run = run_with({**OVERLAP, "high_priority_a2a_comm_stream": True})
    if HAS_0_19:
        check_exchange(run, "torch")
        return
    installed = importlib.metadata.version("megatron-core")
    with pytest.raises(UserError, match=f"comm_stream: needs Megatron-Core 0.19 .*{installed} is"):
        check_exchange(run, "torch")


def test_nothing_is_needed_by_default() -> None:
    check_exchange(run_with({}), "te")
