"""bf16 training: every layout is as near to fp32 as bf16 in one process is, with fp32 gradients and master weights.

Each token goes to all experts here: a rounding that changes which experts it goes to would hide any other error.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.parallel.oracle import Outcome, outcome, train_step, training
from tests.parallel.test_equal_to_one_process import run_tree
from tests.ranks import run_ranks


@functools.cache
def one_process(precision: str) -> Outcome:
    tree = run_tree(parallel={"distributed_optimizer": False}, precision=precision, model__top_k=4)
    return outcome(tree, ranks=1)


@pytest.mark.parametrize(
    ("ranks", "parallel", "changes"),
    [
        pytest.param(2, {"expert": 2}, {"recompute": "full"}, id="ep2, recompute full", marks=pytest.mark.slow),
        pytest.param(2, {"tensor": 2}, {"recompute": "selective"}, id="tp2, recompute", marks=pytest.mark.slow),
        pytest.param(4, {"tensor": 2, "expert": 2, "pipeline": 2}, {}, id="tp2 ep2 pp2"),
    ],
)
def test_layout_rounds_no_worse_than_one_process(ranks: int, parallel: dict[str, Any], changes: dict[str, Any]) -> None:
    truth, usual = one_process("fp32"), one_process("bf16")
    split = outcome(run_tree(parallel=parallel, precision="bf16", model__top_k=4, **changes), ranks)
    # Of tensors, whose many roundings add up alike everywhere. The error of a loss, one number of either sign, may be
    # near zero in one process by luck.
    for what, ours, theirs, exact in (
        ("gradient of", split.gradients, usual.gradients, truth.gradients),
        ("after three steps", split.weights, usual.weights, truth.weights),
    ):
        for name, expected in exact.items():
            error, usual_error = distance(ours[name], expected), distance(theirs[name], expected)
            assert error < 1.5 * usual_error, f"{what} {name}: {error:.1e} from fp32, one process {usual_error:.1e}"


def test_without_a_split_of_sums_only_fp32_additions_differ() -> None:
    """Data-parallel ranks compute the same micro-batches, so that gradients kept in bf16 anywhere would show."""
    usual = one_process("bf16")
    split = outcome(run_tree(precision="bf16", model__top_k=4), ranks=2)
    for name, expected in usual.gradients.items():
        assert distance(split.gradients[name], expected) < 1e-5, name
    for name, expected in usual.weights.items():
        assert distance(split.weights[name], expected) < 1e-5, name


def keeps_fp32(tree: dict[str, Any]) -> dict[str, bool]:
    with training(tree, 1) as (run, model, batches_of_steps):
        from jetmoe_megatron.training.optimizer import build_optimizer

        (batches,) = batches_of_steps
        optimizer = build_optimizer(run, model)
        train_step(model, optimizer, batches, learning_rate=1e-4)
        weights = list(model[0].parameters())
        masters = [master for part in optimizer.chained_optimizers for group in part.shard_fp32_from_float16_groups
                   for master in group]  # fmt: skip
        return {
            "weights are bf16": {w.dtype for w in weights} == {torch.bfloat16},
            "gradients are fp32": {w.main_grad.dtype for w in weights} == {torch.float32},
            "master weights are fp32": {m.dtype for m in masters} == {torch.float32},
            "master weights hold more than bf16": any((m != m.bfloat16().float()).any() for m in masters),
        }


def test_gradients_and_master_weights_are_fp32() -> None:
    assert all(all(kept.values()) for kept in run_ranks(2, keeps_fp32, run_tree(precision="bf16")))


def distance(value: Tensor, truth: Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return ((value - truth).norm() / truth.norm()).item()
