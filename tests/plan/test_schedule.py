"""The order of passes that is recorded without a model, beside that of real ranks."""

from __future__ import annotations

from typing import Any

import pytest

from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.schedule import orders
from tests.parallel.oracle import training
from tests.parallel.test_equal_to_one_process import run_tree
from tests.ranks import run_ranks

Seen = list[tuple[str, int, int]]  # direction, chunk, micro-batch


def real_order(tree: dict[str, Any]) -> Seen:
    """In a rank: what Megatron's functions for a pass are called with."""
    from megatron.core.pipeline_parallel import schedules

    from jetmoe_megatron.training.optimizer import build_optimizer
    from jetmoe_megatron.training.step import compute_gradients

    seen: Seen = []
    outputs: dict[int, tuple[int, int]] = {}
    forward, backward = schedules.forward_step, schedules.backward_step

    def tensor(output: Any) -> Any:
        return output[0] if isinstance(output, list) else output

    def forward_step(*arguments: Any, **named: Any) -> Any:
        output, tokens = forward(*arguments, **named)
        which = named.get("vp_stage") or 0, named["current_microbatch"]
        outputs[id(tensor(output))] = which
        seen.append(("forward", *which))
        return output, tokens

    def backward_step(given: Any, output: Any, *rest: Any) -> Any:
        seen.append(("backward", *outputs.pop(id(tensor(output)))))
        return backward(given, output, *rest)

    schedules.forward_step, schedules.backward_step = forward_step, backward_step
    with training(tree, 1) as (run, model, (batches,)):
        compute_gradients(model, build_optimizer(run, model), batches)
    return seen


@pytest.mark.parametrize(
    ("ranks", "parallel"),
    [
        pytest.param(1, {}, id="one stage"),
        pytest.param(2, {"pipeline": 2}, id="pp2"),
        pytest.param(4, {"pipeline": 4, "overlap_grad_reduce": True}, id="pp4"),
        pytest.param(2, {"pipeline": 2, "virtual_pipeline": 2}, id="pp2 vpp2"),
        pytest.param(4, {"pipeline": 2, "tensor": 2, "virtual_pipeline": 2}, id="tp2 pp2 vpp2"),
        pytest.param(
            3, {"pipeline": 3, "virtual_pipeline": 2, "layers_per_stage": [1] * 6}, id="pp3 vpp2, groups of 4"
        ),
    ],
)
def test_the_order_is_that_of_real_ranks(ranks: int, parallel: dict[str, Any]) -> None:
    tree = run_tree(parallel=parallel, batch__micro_sequences=1)
    tree["model"]["num_layers"] = sum(parallel.get("layers_per_stage", [4]))
    run = Run.model_validate(tree)
    layout = resolve_layout(run, ranks)
    found = [[(one.direction, one.chunk, one.micro_batch) for one in order.passes] for order in orders(run, layout)]
    real = run_ranks(ranks, real_order, tree)
    per_stage = ranks // layout.pipeline
    assert layout.micro_batches > layout.pipeline
    assert [found[rank // per_stage] for rank in range(ranks)] == real


def test_when_gradients_may_be_reduced() -> None:
    """Source: schedules.py, `forward_backward_pipelining_without_interleaving`."""
    run = Run.model_validate(run_tree(parallel={"pipeline": 2, "overlap_grad_reduce": True}, batch__micro_sequences=1))
    first, last = orders(run, resolve_layout(run, 2))
    assert first.reduces == []  # the last backward pass starts it
    assert last.reduces == [len(last.passes)]


def test_stages_wait_for_their_messages_unless_chunks_hide_them() -> None:
    def waits(**parallel: Any) -> list[list[bool]]:
        run = Run.model_validate(run_tree(parallel={"pipeline": 2, **parallel}, batch__micro_sequences=1))
        return [[one.blocks for one in order.passes] for order in orders(run, resolve_layout(run, 2))]

    for number, blocks in enumerate(waits()):
        assert sum(blocks) == len(blocks) // 2  # one direction has no neighbour
        assert blocks[number]
    for blocks in waits(virtual_pipeline=2):
        middle = blocks[len(blocks) // 3 : -len(blocks) // 3]
        assert not any(middle) and any(blocks)
