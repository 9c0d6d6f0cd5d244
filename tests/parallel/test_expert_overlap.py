"""Megatron's overlap of the experts' exchange with another micro-batch changes only the order of additions.

Megatron allows it in bf16 only, where that order shows. These tests bypass its check and use the schedule in fp32.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.oracle import outcome
from tests.parallel.test_equal_to_one_process import GLOBAL, OVERLAP, check_equal, one_process, run_tree


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
