"""Rehearsals as a GPU computes, which cannot be compared with real ranks here: with formulas and with each other."""

from __future__ import annotations

import os
from typing import Any

import pytest

from jetmoe_megatron.config import load_run
from jetmoe_megatron.config.flops import step_flops
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.plan.parts import LOGITS
from jetmoe_megatron.plan.rehearsal import Rehearsal, Waits
from jetmoe_megatron.plan.routing import Routing
from tests.parallel.test_equal_to_one_process import run_tree
from tests.ranks import run_ranks
from tests.support import REPO

BF16 = {"precision": "bf16"}


def rehearse_all(tree: dict[str, Any], world: int, imbalance: float = 1.0) -> list[Rehearsal]:
    """Each rank of the world. In a process of its own: it installs the CPU adapter."""
    from jetmoe_megatron.plan.rehearse import rehearse

    run = Run.model_validate(tree)
    layout = resolve_layout(run, world)
    return [rehearse(run, layout, rank, "gpu", imbalance) for rank in range(world)]


def rehearsed(world: int, parallel: dict[str, Any], imbalance: float = 1.0, **changes: Any) -> list[Rehearsal]:
    found: list[Rehearsal]
    (found,) = run_ranks(1, rehearse_all, run_tree(parallel=parallel, **BF16, **changes), world, imbalance)
    return found


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        pytest.param(1, {}, id="one rank"),
        pytest.param(8, {"tensor": 2, "expert": 2, "pipeline": 2}, id="tp2 ep2 pp2 dp2"),
        pytest.param(4, {"pipeline": 2, "virtual_pipeline": 2}, id="pp2 vpp2 dp2"),
        pytest.param(4, {"tensor": 2, "expert_tensor": 2, "expert": 2, "attention_experts": "sharded"}, id="etp2 ep2"),
    ],
)
def test_flops_of_all_ranks_are_those_of_the_formula(world: int, parallel: dict[str, Any]) -> None:
    run = Run.model_validate(run_tree())
    model, tokens = run.model, run.batch.global_tokens
    of_norms_and_biases = (
        6 * tokens * (4 * model.num_layers + 1) * model.hidden_size
    )  # N counts them; no matmul has them
    formula = step_flops(model, run.batch.sequence_length, tokens)
    plans = rehearsed(world, parallel)
    scores = sum(plan.flops(lambda k: f"{k.part}, {k.direction}")["attention scores, forward"] for plan in plans)
    matmuls = sum(n for plan in plans for part, n in plan.flops().items() if part != "attention scores")
    assert matmuls == formula.weights_only - of_norms_and_biases
    assert 3 * scores == formula.with_attention - formula.weights_only


def test_recomputation_is_told_apart() -> None:
    (none,), (full,) = rehearsed(1, {}), rehearsed(1, {}, recompute="full")

    def by_direction(plan: Rehearsal) -> dict[str, int]:
        return plan.flops(lambda kernels: kernels.direction)

    first = by_direction(none)
    assert {k: v for k, v in by_direction(full).items() if k != "recompute"} == first
    # Layers are computed again; the output layer is in none of them.
    logits = none.flops(lambda k: f"{k.part}, {k.direction}")["logits and loss, forward"]
    assert by_direction(full)["recompute"] == first["forward"] - logits
    assert sum(full.memory.peak.values()) < sum(none.memory.peak.values())


def test_passes_and_chunks_are_told_apart() -> None:
    """Each chunk of each of two stages has one of four equal layers; the last one has the logits, too."""
    one = rehearsed(2, {"pipeline": 2, "virtual_pipeline": 2, "overlap_grad_reduce": True})
    found = [plan.flops(lambda k: f"{k.direction} {k.chunk}" if k.part != LOGITS else k.part) for plan in one]
    layer = found[0]["forward 0"]
    for flops in found:
        assert flops["forward 0"] == flops["forward 1"] == layer
        assert flops["backward 0"] == flops["backward 1"] > 2 * layer  # flash attention computes its scores again
        assert set(flops) <= {"forward 0", "forward 1", "backward 0", "backward 1", LOGITS}
    assert LOGITS in found[1] and LOGITS not in found[0]
    assert {k.chunk for plan in one for k in plan.kernels if k.part == LOGITS} == {1}
    assert {k.chunk for plan in one for k in plan.kernels if k.part == "embedding"} == {0}
    assert {k.direction for plan in one for k in plan.kernels if k.part == "optimizer"} == {"update"}


def test_a_pass_that_only_counts_is_in_no_pass() -> None:
    balance = {"balance": 0.1, "z": 0.01}
    of_a_micro_batch, of_the_step = (
        rehearsed(1, {}, losses={**balance, "scope": scope})[0].flops(lambda k: k.direction)
        for scope in ("micro_batch", "global_batch")
    )
    assert of_the_step["forward"] == of_a_micro_batch["forward"]
    assert of_the_step["update"] > 0


def test_an_overlapped_exchange_hides_no_part_and_no_chunk() -> None:
    """Megatron then calls the parts of a layer and the output layer alone, without the model."""
    sharded = {"expert": 2, "pipeline": 2, "virtual_pipeline": 2}
    plain, overlapped = (
        rehearsed(4, {**sharded, "overlap_moe_expert_parallel_comm": overlap}) for overlap in (False, True)
    )
    for one, other in zip(plain, overlapped, strict=True):
        assert one.flops(lambda k: f"{k.part}, {k.direction}, {k.chunk}") == other.flops(
            lambda k: f"{k.part}, {k.direction}, {k.chunk}"
        )
        passes = {(k.direction, k.chunk) for k in other.kernels if k.part == LOGITS}
        assert passes == {(k.direction, k.chunk) for k in one.kernels if k.part == LOGITS}


def test_a_mask_of_documents_lets_no_kernel_skip_half_of_the_scores() -> None:
    (causal,), (masked,) = rehearsed(1, {}), rehearsed(1, {}, data={"mask_attention": True})
    assert masked.flops()["attention scores"] == 2 * causal.flops()["attention scores"]


def test_the_host_waits_twice_in_a_step_without_expert_parallelism() -> None:
    for micro_sequences in (1, 4):
        (plan,) = rehearsed(1, {}, batch__micro_sequences=micro_sequences)
        assert plan.host_waits == [
            Waits("update", 0, "optimizer/clip_grads.py, get_grad_norm_fp32", 1),
            Waits("update", 0, "training/metrics.py, _sum_over_ranks", 1),
        ]


def test_the_host_waits_in_each_layer_with_sharded_attention_experts() -> None:
    plans = rehearsed(2, {"expert": 2, "attention_experts": "sharded"})
    layers_and_micro_batches = 4 * 2
    for plan in plans:
        number = {(waits.direction, waits.place): waits.number for waits in plan.host_waits}
        assert number["forward", "moe/token_dispatcher.py, _maybe_dtoh_and_synchronize"] == layers_and_micro_batches
        assert number["forward", "model/token_dispatcher.py, _plan_exchange"] == 3 * layers_and_micro_batches


def test_the_fullest_expert_costs_its_rank_memory_and_time() -> None:
    even, uneven = (rehearsed(2, {"expert": 2}, imbalance) for imbalance in (1.0, 1.5))

    def peak(plan: Rehearsal) -> int:
        return sum(plan.memory.peak.values())

    assert abs(peak(even[0]) - peak(even[1])) < 0.01 * peak(even[0])
    assert peak(uneven[0]) > peak(even[0]) and peak(uneven[1]) < peak(even[1])
    # Of 4 experts, the first two have 1.5 / 4 and 2.5 / 12 of the rows.
    assert uneven[0].flops()["moe"] / even[0].flops()["moe"] == pytest.approx(2 * (1.5 / 4 + 2.5 / 12), rel=0.01)


def test_a_save_gathers_the_optimizer_state_of_all_ranks() -> None:
    """In a bucket as large as the gradients': its own half in one piece, and both halves of what is sent at once."""
    (one,), (first, _) = rehearsed(1, {}), rehearsed(2, {})
    extra = [sum(memory.peak_in_save.values()) - sum(memory.kept.values()) for memory in (one.memory, first.memory)]
    between_steps = extra[0]  # without another rank, there is nothing to gather
    assert 0 <= between_steps < 2**15
    assert extra[1] - between_steps == pytest.approx(1.5 * first.memory.kept["gradients"], rel=0.01)


def test_a_rehearsal_can_be_saved() -> None:
    for plan in rehearsed(2, {"pipeline": 2}):
        assert Rehearsal.load(plan.dump()) == plan


def rehearse_twice(tree: dict[str, Any]) -> list[Rehearsal]:
    return [*rehearse_all(tree, 1), *rehearse_all(tree, 1)]


def test_a_second_rehearsal_in_a_process_finds_the_same() -> None:
    ((first, second),) = run_ranks(1, rehearse_twice, run_tree(**BF16))
    assert any(kernels.name.startswith("fused") for kernels in first.kernels)
    assert second == first


@pytest.mark.parametrize("imbalance", [0.9, 2.1])
def test_an_imbalance_that_cannot_be(imbalance: float) -> None:
    with pytest.raises(UserError, match=r"imbalance: must be from 1 to 2 \(num_experts / top_k\)"):
        Routing(experts=4, top_k=2, imbalance=imbalance)


def eight_billion(world: int, *overrides: str) -> list[Rehearsal]:
    from jetmoe_megatron.plan.world import rehearse_world

    os.environ.update(DATA="unused", OUTPUT="unused")
    run = load_run(REPO / "configs/jetmoe_8b/run.yaml", overrides)
    return rehearse_world(run, resolve_layout(run, world))


def test_the_published_run() -> None:
    """Its stages in bytes: weights in bf16, gradients in fp32, three numbers of fp32 for each weight over 32 ranks."""
    (stages,) = run_ranks(1, eight_billion, 96)
    assert [stage.parameters for stage in stages] == [2_884_435_968, 2_818_899_968, 2_884_438_016]
    for stage in stages:
        kept = stage.memory.kept
        assert kept["weights"] == pytest.approx(2 * stage.parameters, rel=1e-3)
        assert kept["gradients"] == pytest.approx(4 * stage.parameters, rel=1e-3)
        assert kept["main weights"] + kept["optimizer state"] == pytest.approx(12 * stage.parameters / 32, rel=1e-2)
    activations = [stage.memory.peak["activations"] for stage in stages]
    assert activations[0] > activations[1]  # three micro-batches are under way, then two
    for stage in stages:
        sent = {entry.kind for entry in stage.transfers if entry.group == "PIPELINE_MODEL_PARALLEL_GROUP"}
        assert sent == {"send", "recv"}
        number = sum(entry.number for entry in stage.transfers if entry.kind == "send")
        assert number == stage.micro_batches * (1 if stage is not stages[1] else 2)


@pytest.mark.parametrize(
    ("override", "key"),
    [("parallel.context=2", "parallel.context"), ("parallel.moe_token_dispatcher=deepep", "moe_token_dispatcher")],
)
def test_what_needs_packages_for_gpus(override: str, key: str) -> None:
    from jetmoe_megatron.plan.check import check_can_rehearse

    os.environ.update(DATA="unused", OUTPUT="unused")
    run = load_run(REPO / "configs/jetmoe_8b/run.yaml", [override])
    with pytest.raises(UserError, match=key):
        check_can_rehearse(run)
