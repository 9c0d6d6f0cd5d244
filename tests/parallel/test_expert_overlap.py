"""Megatron's overlap of the experts' exchange with another micro-batch changes only the order of additions.

Megatron allows it in bf16 only, where that order shows. These tests bypass its check and use the schedule in fp32.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.model_parallel_config import ModelParallelConfig

from tests.parallel.oracle import Outcome, joined, outcome, train
from tests.parallel.test_equal_to_one_process import GLOBAL, OVERLAP, check_equal, one_process, run_tree
from tests.ranks import run_ranks


def overlap(model: list[Any]) -> None:
    for chunk in model:
        chunk.config.overlap_moe_expert_parallel_comm = True


@pytest.mark.parametrize(
    ("ranks", "parallel", "changes"),
    [
        pytest.param(2, {"expert": 2}, {}, id="ep2"),
        pytest.param(2, {"expert": 2}, {"data": {"reset_positions": True}}, id="ep2, positions of documents"),
        pytest.param(4, {"expert": 4}, {"batch__micro_sequences": 1, **GLOBAL}, id="ep4, one expert on a rank"),
        pytest.param(2, {"expert": 2}, {"recompute": "selective"}, id="ep2, recompute selective"),
        pytest.param(
            4,
            {"expert": 2, "tensor": 2, "expert_tensor": 2, "attention_experts": "sharded", **OVERLAP},
            {},
            id="tp2 etp2 ep2, attention experts sharded, all overlaps",
        ),
        pytest.param(4, {"expert": 2, "pipeline": 2, "virtual_pipeline": 2}, {}, id="ep2 pp2 vpp2"),
        pytest.param(
            8,
            {"expert": 2, "tensor": 2, "pipeline": 2, "virtual_pipeline": 2, **OVERLAP},
            {},
            id="tp2 ep2 pp2 vpp2 dp2, all overlaps",
        ),
    ],
)
def test_equals_one_process(ranks: int, parallel: dict[str, Any], changes: dict[str, Any]) -> None:
    check_equal(outcome(run_tree(parallel=parallel, **changes), ranks, prepare=overlap), one_process(changes))


@pytest.mark.parametrize(
    ("ranks", "parallel", "changes"),
    [
        pytest.param(2, {"expert": 2}, {}, id="ep2"),
        pytest.param(2, {"expert": 2}, {"recompute": "selective"}, id="ep2, recompute selective"),
        pytest.param(4, {"expert": 2, "attention_experts": "sharded", **OVERLAP}, {}, id="ep2 dp2, all overlaps"),
    ],
)
def test_delayed_weight_gradients_are_the_same(ranks: int, parallel: dict[str, Any], changes: dict[str, Any]) -> None:
    together = {**parallel, "overlap_moe_expert_parallel_comm": True}
    trees = [
        run_tree(precision="bf16", parallel={**together, "delay_wgrad_compute": delay}, **changes)
        for delay in (False, True)
    ]
    at_once, delayed = (outcome(tree, ranks) for tree in trees)
    same(at_once, delayed)


def same(one: Outcome, other: Outcome) -> None:
    assert one.losses == other.losses
    for tensors, others in ((one.gradients, other.gradients), (one.weights, other.weights)):
        assert tensors.keys() == others.keys() and all(torch.equal(t, others[name]) for name, t in tensors.items())


needs_0_19 = pytest.mark.skipif(
    not hasattr(ModelParallelConfig, "overlap_dispatch_backward_with_experts_wgrad"),
    reason="an option of Megatron-Core 0.19",
)


def pretend_transformer_engine(tree: dict[str, Any], ranks: int) -> Outcome:
    """Megatron asks for it, because its own experts delay their gradients through it; ours do not."""
    return joined(run_ranks(ranks, train_with_a_version_of_te, tree))


def train_with_a_version_of_te(tree: dict[str, Any]) -> Any:
    with patch("megatron.core.transformer.transformer_config.is_te_min_version", lambda *arguments: True):
        return train(tree, 3, None)


@needs_0_19
def test_weight_gradients_beside_the_exchange_are_the_same() -> None:
    trees = [
        run_tree(parallel={"expert": 2, "overlap_dispatch_backward_with_experts_wgrad": delay})
        for delay in (False, True)
    ]
    at_once, delayed = (pretend_transformer_engine(tree, 2) for tree in trees)
    same(at_once, delayed)


@needs_0_19
def test_priority_of_the_exchange_changes_nothing() -> None:
    trees = [
        run_tree(
            precision="bf16",
            parallel={
                "expert": 2,
                "overlap_moe_expert_parallel_comm": True,
                "high_priority_a2a_comm_stream": priority,
            },
        )
        for priority in (False, True)
    ]
    same(*(outcome(tree, 2) for tree in trees))


def overlap_with_late_biases(model: list[Any]) -> None:
    """As where DDP's hook on a module waits for its weights to be gathered."""
    from jetmoe_megatron.model.mlp import MixtureOfMLPs

    def arrive(module: Any, _: Any) -> None:
        if module.bias.isnan().any():
            module.bias.data.zero_()

    overlap(model)
    for layer in (module for chunk in model for module in chunk.modules() if isinstance(module, MixtureOfMLPs)):
        layer.bias.data.fill_(float("nan"))
        layer.register_forward_pre_hook(arrive)


def test_weights_that_are_gathered_late_are_waited_for() -> None:
    late = outcome(run_tree(parallel={"expert": 2}), 2, prepare=overlap_with_late_biases)
    for ours, expected in zip(late.losses, one_process({}).losses, strict=True):
        assert ours == pytest.approx(expected, rel=1e-5)
