"""A rank that computes slowly is found, although the others wait for it."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from tests.parallel.oracle import training
from tests.parallel.test_equal_to_one_process import run_tree
from tests.ranks import run_ranks


def steps_with_a_slow_rank(tree: dict[str, Any], slow: int) -> list[dict[str, float]]:
    """Of three steps, what is recorded."""
    with training(tree, 3) as (run, model, batches_of_steps):
        from jetmoe_megatron.model.attention import MixtureOfAttention
        from jetmoe_megatron.training.metrics import reduce_metrics
        from jetmoe_megatron.training.optimizer import build_optimizer
        from jetmoe_megatron.training.rank_speed import RankSpeed
        from jetmoe_megatron.training.step import compute_gradients

        first = next(m for chunk in model for m in chunk.modules() if isinstance(m, MixtureOfAttention))
        attend = first.core_attention

        def late(*arguments: Any) -> Any:
            time.sleep(0.1)
            return attend(*arguments)

        if int(os.environ["RANK"]) == slow:
            first.core_attention = late
        optimizer, speed, found = build_optimizer(run, model), RankSpeed(model), []
        for batches in batches_of_steps:
            losses, norm = compute_gradients(model, optimizer, batches)
            metrics, _ = reduce_metrics(model, losses, norm, 0.0, stop=False, own_seconds=speed.seconds())
            found.append(metrics.dump())
        return found


@pytest.mark.parametrize("parallel", [{}, {"tensor": 2}, {"pipeline": 2, "virtual_pipeline": 2}, {"expert": 2}])
def test_it_is_named(parallel: dict[str, Any]) -> None:
    one, other = run_ranks(2, steps_with_a_slow_rank, run_tree(parallel=parallel), 1)
    assert [step["slowest_rank"] for step in one[1:]] == [1, 1] and "slowest_rank" not in one[0]
    assert min(step["slowest_rank_ratio"] for step in one[1:]) > 5
    assert [step["slowest_rank"] for step in other[1:]] == [1, 1]


def test_a_rank_alone_is_not_compared() -> None:
    (steps,) = run_ranks(1, steps_with_a_slow_rank, run_tree(), 0)
    assert not any("slowest_rank" in step for step in steps)
