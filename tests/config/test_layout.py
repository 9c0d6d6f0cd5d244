from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.config import Run
from jetmoe_megatron.config.layout import Layout, resolve_layout
from jetmoe_megatron.errors import UserError
from tests.support import small_run

DATA = {"code": "data/code", "prose": "data/prose"}


def layout(world: int, **changes: Any) -> Layout:
    return resolve_layout(Run.model_validate(small_run(Path("x"), DATA, **changes)), world)


def test_one_rank() -> None:
    one = layout(1)
    assert (one.data, one.global_sequences, one.micro_batches, one.phase_steps) == (1, 8, 4, (5, 3))
    assert [one.phase_at(step) for step in (0, 4, 5, 7)] == [0, 0, 1, 1]
    with pytest.raises(IndexError):
        one.phase_at(8)


def test_published_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    from jetmoe_megatron.config import load_run

    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("OUTPUT", "/output")
    jetmoe = resolve_layout(load_run("configs/jetmoe_8b/run.yaml"), 96)
    assert (jetmoe.pipeline, jetmoe.data, jetmoe.micro_batches) == (3, 32, 32)


@pytest.mark.parametrize(
    ("stages", "micro_batches", "group"),
    [(2, 4, 2), (2, 3, 3), (2, 5, 3), (3, 32, 4), (3, 16, 4), (3, 11, 4), (3, 5, 5), (4, 6, 6), (4, 4, 4)],
)
def test_groups_of_micro_batches_in_virtual_stages(stages: int, micro_batches: int, group: int) -> None:
    found = layout(
        stages,
        model__num_layers=2 * stages,
        parallel={"pipeline": stages, "virtual_pipeline": 2},
        batch={"sequence_length": 32, "micro_sequences": 1, "global_tokens": 32 * micro_batches},
    )
    assert (found.micro_batches, found.micro_batch_group) == (micro_batches, group)


def test_phases_are_rounded_up_to_whole_steps() -> None:
    assert layout(1, phases__0__tokens=5 * 256 + 1).phase_steps == (6, 3)


OVERLAP = {"parallel__expert": 2, "parallel__overlap_moe_expert_parallel_comm": True}
REFUSED: list[tuple[int, dict[str, Any], str]] = [
    (3, {"parallel__tensor": 2}, "tensor 2 x pipeline 1 = 2 does not divide the world of 3 ranks"),
    (2, {"parallel__pipeline": 4}, "tensor 1 x pipeline 4 = 4 does not divide the world of 2 ranks"),
    (2, {"parallel__expert": 4}, "expert 4 x expert_tensor 1 x pipeline 1 = 4 does not divide the world of 2 ranks"),
    (4, {"parallel__tensor": 4}, "parallel.tensor: 4 does not divide model.num_kv_heads (2)"),
    (2, {"parallel__tensor": 2, "model__vocab_size": 97}, "does not divide model.vocab_size (97)"),
    (3, {"parallel__expert": 3}, "parallel.expert: 3 does not divide model.num_experts (4)"),
    (5, {"parallel__expert_tensor": 5}, "parallel.expert_tensor: 5 does not divide model.ffn_hidden_size (48)"),
    (3, {"parallel__pipeline": 3}, "= 3 does not divide model.num_layers (2)"),
    (2, {"parallel__virtual_pipeline": 2}, "parallel.virtual_pipeline: needs parallel.pipeline > 1"),
    (2, {"parallel__tensor": 2, "parallel__sequence": False}, "need sequence parallelism when parallel.tensor > 1"),
    (1, {"parallel__sequence": True}, "parallel.sequence: needs parallel.tensor > 1"),
    (2, {"parallel__context": 4}, "tensor 1 x pipeline 1 x context 4 = 4 does not divide the world of 2 ranks"),
    (2, {"parallel__context": 2, "batch__sequence_length": 2, "batch__global_tokens": 16}, "multiple of 2 x context 2"),
    (2, {"parallel__overlap_moe_expert_parallel_comm": True}, "expert_parallel_comm: needs parallel.expert > 1"),
    (2, {**OVERLAP}, "expert_parallel_comm: needs precision: bf16"),
    (2, {**OVERLAP, "precision": "bf16", "recompute": "full"}, "needs recompute: none or selective"),
    (2, {**OVERLAP, "precision": "bf16", "parallel__pipeline": 2}, "needs parallel.virtual_pipeline > 1 if"),
    (3, {}, "8 sequences per step (global_tokens / sequence_length) do not divide into 3 data-parallel ranks"),
    (
        2,
        {"model__num_layers": 4, "parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "batch__micro_sequences": 8},
        "parallel.virtual_pipeline: a step has 1 micro-batches, fewer than parallel.pipeline (2) stages",
    ),
    (1, {"batch__micro_sequences": 3}, "do not divide into 1 data-parallel ranks x 3 micro_sequences"),
]


@pytest.mark.parametrize(("world", "changes", "message"), REFUSED, ids=[m[:50] for _, _, m in REFUSED])
def test_refused_by_name(world: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        layout(world, **changes)
    assert message in str(caught.value)
