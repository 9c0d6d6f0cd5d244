"""The time of a step by part: what is slow on purpose is found in its own part, and only there."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import pytest

from tests.parallel.oracle import training
from tests.parallel.test_equal_to_one_process import run_tree
from tests.ranks import run_ranks

PARTS = ("forward_backward_seconds", "gradient_reduction_seconds", "optimizer_seconds")
DELAY = 0.5


def late(function: Any) -> Any:
    def call(*arguments: Any, **named: Any) -> Any:
        time.sleep(DELAY)
        return function(*arguments, **named)

    return call


def parts_of_steps(tree: dict[str, Any], slow: str) -> list[dict[str, float]]:
    """Of each of three steps, what is told after the next one, and how long it took in all."""
    with training(tree, 4) as (run, model, batches_of_steps):
        from megatron.core.distributed import DistributedDataParallel
        from megatron.core.optimizer import ChainedOptimizer

        from jetmoe_megatron.model.attention import MixtureOfAttention
        from jetmoe_megatron.training.optimizer import build_optimizer
        from jetmoe_megatron.training.step import compute_gradients, evaluate, update_weights
        from jetmoe_megatron.training.step_times import StepTimes

        name, owner, method = {
            PARTS[0]: ("forward", MixtureOfAttention, MixtureOfAttention.forward),
            PARTS[1]: (
                "finish_grad_sync",
                DistributedDataParallel,
                DistributedDataParallel.finish_grad_sync,
            ),
            PARTS[2]: ("step_with_ready_grads", ChainedOptimizer, ChainedOptimizer.step_with_ready_grads),
        }[slow]
        optimizer, times, found, took = build_optimizer(run, model), StepTimes(model), [], 0.0
        with patch.object(owner, name, late(method)):
            for batches in batches_of_steps:
                began = time.perf_counter()
                times.begin()
                _, norm = compute_gradients(model, optimizer, batches)
                with times.optimizer():
                    update_weights(optimizer, norm, run.optimizer.max_lr)
                record, took = times.seconds() | {"whole": took}, time.perf_counter() - began
                evaluate(model, batches)  # between steps: in none of them
                found.append(record)
        return found


@pytest.mark.parametrize("slow", PARTS)
@pytest.mark.parametrize("parallel", [{}, {"pipeline": 2, "virtual_pipeline": 2}], ids=["data", "virtual pipeline"])
def test_what_is_slow_is_in_its_part(slow: str, parallel: dict[str, Any]) -> None:
    for first, *steps in run_ranks(2, parts_of_steps, run_tree(parallel=parallel), slow):
        assert set(first) == {"whole"}
        for step in steps:
            assert step[slow] >= DELAY
            assert sum(step[part] for part in PARTS) <= step["whole"]
        for part in {*PARTS} - {slow}:
            assert min(step[part] for step in steps) < DELAY  # a busy machine may slow down one of them
