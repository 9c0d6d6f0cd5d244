"""Norms by part are those of the whole model, in every layout."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.parallel.oracle import training
from tests.parallel.test_equal_to_one_process import run_tree
from tests.ranks import run_ranks

STEPS = 3


def norms_of_steps(tree: dict[str, Any]) -> list[dict[str, float]]:
    """What is recorded, the norm that clips, and, on one rank without a float16 model, the truth."""
    with training(tree, STEPS) as (run, model, batches_of_steps):
        from jetmoe_megatron.training.norms import PARTS, Norms, part_of_model
        from jetmoe_megatron.training.optimizer import build_optimizer
        from jetmoe_megatron.training.step import compute_gradients, update_weights

        optimizer, found = build_optimizer(run, model), []
        norms = Norms(model, optimizer)
        named = [pair for chunk in model for pair in chunk.named_parameters()]
        for batches in batches_of_steps:
            before = [parameter.detach().clone() for _, parameter in named]
            _, norm = compute_gradients(model, optimizer, batches)
            record = {"whole": norm, **norms.of_gradients()}
            for number, part in enumerate(PARTS):
                own = [p.main_grad.double().flatten() for name, p in named if part_of_model(name) == number]
                record[f"truth/grad_norm/{part}"] = float(torch.cat(own).norm()) if own else 0.0
            update_weights(optimizer, norm, run.optimizer.max_lr)
            record |= norms.of_update()
            after = [parameter.detach() for _, parameter in named]
            changes = [(new.double() - old.double()).flatten() for new, old in zip(after, before, strict=True)]
            record["truth/update_norm"] = float(torch.cat(changes).norm())
            record["truth/param_norm"] = float(torch.cat([new.double().flatten() for new in after]).norm())
            found.append(record)
        return found


def tree(precision: str = "fp32", **parallel: Any) -> dict[str, Any]:
    plain = run_tree(parallel=parallel)
    plain["optimizer"] |= {"clip_grad": 0.5, "weight_decay": 0.3}
    return plain | {"precision": precision}


@pytest.fixture(scope="module")
def truth() -> list[dict[str, float]]:
    (steps,) = run_ranks(1, norms_of_steps, tree(distributed_optimizer=False))
    return steps


def test_one_process(truth: list[dict[str, float]]) -> None:
    for step in truth:
        names = [name for name in step if f"truth/{name}" in step]
        assert len(names) == 7
        for name in names:
            assert step[name] == pytest.approx(step[f"truth/{name}"], rel=1e-5), name


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"distributed_optimizer": False},
        {"tensor": 2},
        {"pipeline": 2},
        {"pipeline": 2, "virtual_pipeline": 2},
        {"expert": 2},
        {"expert": 2, "attention_experts": "sharded"},
        {"tensor": 2, "expert_tensor": 2, "distributed_optimizer": False},
    ],
    ids=str,
)
def test_layouts(parallel: dict[str, Any], truth: list[dict[str, float]]) -> None:
    for steps in run_ranks(2, norms_of_steps, tree(**parallel)):
        for step, expected in zip(steps, truth, strict=True):
            parts = [value for name, value in step.items() if name.startswith("grad_norm/")]
            assert math.sqrt(sum(part**2 for part in parts)) == pytest.approx(step["whole"], rel=1e-6)
            for name in ("param_norm", "update_norm", *(name for name in step if name.startswith("grad_norm/"))):
                assert step[name] == pytest.approx(expected[name], rel=1e-4), name


@pytest.mark.parametrize("parallel", [{}, {"distributed_optimizer": False}], ids=str)
def test_bf16(parallel: dict[str, Any]) -> None:
    for step in run_ranks(2, norms_of_steps, tree("bf16", **parallel))[0]:
        parts = [value for name, value in step.items() if name.startswith("grad_norm/")]
        assert math.sqrt(sum(part**2 for part in parts)) == pytest.approx(step["whole"], rel=1e-6)
        assert step["param_norm"] == pytest.approx(step["truth/param_norm"], rel=1e-3)
        assert step["update_norm"] == pytest.approx(step["truth/update_norm"], rel=0.1)
