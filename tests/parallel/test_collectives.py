"""Do all members of each process group make the same calls in the same order, from the start of a run to its end?

A difference shows on GPUs as a hang, or as numbers of one exchange that end in another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.injected_faults import Fault, install
from tests.parallel.collectives import Event, StandIn, Transport, first_difference, gloo, record, store_of_ranks, traces
from tests.support import metrics, small_run, training, write_run

TOKENS = 24 * 32  # of a step
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SHARDED = {"attention_experts": "sharded"}
GLOBAL = {"losses": {"balance": 0.1, "z": 0.01, "scope": "global_batch"}}
BF16 = {"precision": "bf16"}
# (ranks, sequences of a micro-batch, parallel section, further changes). Each begins a run, and the next one with the
# same precision continues it.
Layout = tuple[int, int, dict[str, Any], dict[str, Any]]
LAYOUTS: dict[str, Layout] = {
    "dp2": (2, 6, {}, {}),
    "tp2": (2, 12, {"tensor": 2}, {}),
    "dp3, no distributed optimizer": (3, 4, {"distributed_optimizer": False}, GLOBAL),
    "pp2, layers 1 and 3": (2, 6, {"pipeline": 2, "layers_per_stage": [1, 3]}, {}),
    "pp2 vpp2 dp2, overlap": (4, 6, {"pipeline": 2, "virtual_pipeline": 2, **OVERLAP}, BF16),
    "tp2 etp2 dp2, overlap": (4, 6, {"tensor": 2, "expert_tensor": 2, **OVERLAP}, BF16),
    "ep4, no distributed optimizer": (4, 3, {"expert": 4, "distributed_optimizer": False}, BF16),
    "ep2 dp2, attention experts sharded, overlap": (4, 6, {"expert": 2, **SHARDED, **OVERLAP}, {}),
    "tp2 etp2 ep2, attention experts sharded": (
        4,
        6,
        {"tensor": 2, "expert_tensor": 2, "expert": 2, **SHARDED},
        GLOBAL,
    ),
    "tp2 ep4, recompute full": (4, 6, {"tensor": 2, "expert": 4}, {"recompute": "full"}),
    "pp3, layers 1, 2 and 1, dp2": (6, 6, {"pipeline": 3, "layers_per_stage": [1, 2, 1]}, GLOBAL),
    "ep2 pp2 vpp2, overlap of exchange": (
        4,
        6,
        {"expert": 2, "pipeline": 2, "virtual_pipeline": 2, "overlap_moe_expert_parallel_comm": True},
        BF16,
    ),
    "tp2 ep2 pp2 vpp2 dp2, overlap": (
        8,
        6,
        {"tensor": 2, "expert": 2, "pipeline": 2, "virtual_pipeline": 2, **OVERLAP},
        BF16,
    ),
    "tp2 etp2 ep3 pp2, overlap, global batch": (
        12,
        4,
        {"tensor": 2, "expert_tensor": 2, "expert": 3, "pipeline": 2, **SHARDED, **OVERLAP},
        {**BF16, **GLOBAL},
    ),
    "tp2 ep4 pp3 dp4, overlap": (
        24,
        3,
        {"tensor": 2, "expert": 4, "pipeline": 3, "layers_per_stage": [1, 2, 1], **OVERLAP},
        {},
    ),
}


def next_layout(name: str) -> str:
    alike = [other for other, layout in LAYOUTS.items() if BF16.items() <= layout[3].items()]
    alike = alike if name in alike else [other for other in LAYOUTS if other not in alike]
    return alike[(alike.index(name) + 1) % len(alike)]


def tree_of(folder: Path, data: dict[str, str], layout: Layout, **changes: Any) -> dict[str, Any]:
    """Two steps, a switch of the phase and three steps. A checkpoint and a held-out loss come every second step."""
    _, sequences, parallel, further = layout
    base: dict[str, Any] = {
        "model__num_layers": 4,
        "model__num_experts": 12,
        "batch": {"sequence_length": 32, "global_tokens": TOKENS, "micro_sequences": sequences},
        "schedule__warmup_tokens": 0,
        "phases__0__tokens": 2 * TOKENS,
        "phases__1__tokens": 3 * TOKENS,
        "checkpoint": {"every_tokens": 2 * TOKENS, "may_change": ["losses"]},
        "evaluation": {"every_steps": 2, "sequences": 9, "data": [{"name": "v", "path": data["held_out"]}]},
        "debug": {"check_sync": 1},
    }
    return small_run(folder, data, **{**base, "parallel": parallel, **further, **changes})


def traced(
    folder: Path,
    ranks: int,
    tree: dict[str, Any],
    *before: Callable[[], None],
    transport: Transport = StandIn,
) -> tuple[int, str, dict[int, list[Event]]]:
    """Exit status, what went to stderr, and what each rank did."""
    with store_of_ranks() as port:
        hooks = (partial(record, folder / "traces", port, transport), *before)
        ended = training(write_run(folder, tree), before=partial(in_turn, hooks)).run(ranks, timeout=90)
    return ended.returncode, ended.stderr, traces(folder / "traces")


def in_turn(functions: tuple[Callable[[], None], ...]) -> None:
    for function in functions:
        function()


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_members_of_a_group_do_the_same(name: str, tmp_path: Path, data: dict[str, str]) -> None:
    """A run with a step that is skipped, then its continuation in another layout with a rollback, to the end."""
    layout, other = LAYOUTS[name], LAYOUTS[next_layout(name)]
    first = tree_of(tmp_path, data, layout, debug__max_steps=3)
    check(tmp_path / "first", layout[0], first, Fault("loss", 1, rank=layout[0] - 1))
    assert [("skipped" in line, "held_out_loss" in line) for line in metrics(tmp_path / "run")] == [
        (True, False),
        (False, True),
        (False, True),
    ]
    rest = tree_of(tmp_path, data, other, guard__on_bad_step="rollback")
    error = check(tmp_path / "rest", other[0], rest, Fault("loss", 5, rank=other[0] - 1))
    assert f"rolled back to {4 * TOKENS:,} tokens" in error
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def check(folder: Path, ranks: int, tree: dict[str, Any], fault: Fault) -> str:
    """Returns what went to stderr."""
    status, error, found = traced(folder, ranks, tree, partial(install, [fault]))
    assert first_difference(found) is None, f"{first_difference(found)}\n{error}"
    assert status == 0, error
    assert len(found) == ranks and all(found.values())
    return error
