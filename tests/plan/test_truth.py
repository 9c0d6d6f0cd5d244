"""What the rehearsal of a layout says, as a CPU computes, beside what real ranks of that layout do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.plan.rehearsal import Rehearsal
from tests.parallel.recorder import store_of_ranks
from tests.parallel.test_equal_to_one_process import LAYOUTS, run_tree
from tests.plan.real_step import Done, Sent, Sizes, real_sizes, real_work
from tests.ranks import run_ranks

BEYOND: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    **LAYOUTS,
    "pp2 vpp2, 8 micro-batches": (2, {"pipeline": 2, "virtual_pipeline": 2}, {"batch__micro_sequences": 1}),
    "pp2 vpp2, groups of 3": (
        2,
        {"pipeline": 2, "virtual_pipeline": 2},
        {"batch__micro_sequences": 1, "batch__global_tokens": 352},
    ),
    "pp2 dp2, bf16": (4, {"pipeline": 2}, {"precision": "bf16"}),
}
# The rest is slow.
FAST = (
    "tp2 etp2",
    "pp2, layers 1 and 3",
    "pp2 vpp2, 8 micro-batches",
    "ep2, attention experts sharded",
    "recompute full",
    "dp2, overlap",
    "pp2 dp2, bf16",
)
IMBALANCED = ("ep2", "ep4, attention experts sharded", "tp2 etp2 ep2")  # are measured with 1.5, too
CASES = [
    pytest.param(name, imbalance, id=f"{name}{', imbalanced' * (imbalance > 1)}", marks=marks)
    for name in BEYOND
    for marks in ([] if name in FAST else [pytest.mark.slow],)
    for imbalance in ((1.0, 1.5) if name in IMBALANCED else (1.0,))
]


@pytest.mark.parametrize(("name", "imbalance"), CASES)
def test_rehearsal_is_what_real_ranks_do(name: str, imbalance: float, tmp_path: Path) -> None:
    ranks, parallel, changes = BEYOND[name]
    # Wide enough that workspaces within operations, and states of random numbers, do not count.
    shape = {"model__hidden_size": 64, "model__kv_channels": 16, "model__ffn_hidden_size": 96}
    batch = {"batch__sequence_length": 64, "batch__global_tokens": 2 * changes.get("batch__global_tokens", 256)}
    tree = run_tree(parallel=parallel, **shape, **changes | batch)
    sizes = run_ranks(ranks, real_sizes, tree, imbalance)
    with store_of_ranks() as port:
        work = run_ranks(ranks, real_work, tree, imbalance, tmp_path / "traces", port)
    (plan,) = run_ranks(1, rehearsed, tree, ranks, imbalance)
    for rank in range(ranks):
        check_sizes(sizes[rank], plan[rank])
        check_work(work[rank], plan[rank])


def check_sizes(real: Sizes, plan: Rehearsal) -> None:
    kept = plan.memory.kept
    assert plan.parameters == real.parameters
    assert kept["weights"] == real.weights
    assert kept["gradients"] == real.gradients
    assert kept["main weights"] + kept["optimizer state"] == real.optimizer
    in_step = sum(plan.memory.peak.values()) - sum(kept.values())
    print(f"rank {plan.rank}: {in_step:,} bytes at the peak, real {real.in_step:,}: {in_step / real.in_step - 1:+.2%}")
    assert in_step == pytest.approx(real.in_step, rel=0.02)


def check_work(real: Done, plan: Rehearsal) -> None:
    flops = plan.flops()
    assert sum(flops.values()) == real.flops
    if all(
        kernels.direction != "recompute" for kernels in plan.kernels
    ):  # torch's counter loses track of modules there
        routers = flops["moa router"], flops["moe router"]
        modules = {
            "self_attention": routers[0] + flops["moa"] + flops["attention scores"],
            "mlp": routers[1] + flops["moe"],
            "router": sum(routers),
            "output_layer": flops.get("logits and loss", 0),
        }
        assert modules == {kind: real.flops_of_modules.get(kind, 0) for kind in modules}
    sent: Counter[Sent] = Counter()
    for entry in plan.transfers:
        sent[Sent(tuple(entry.ranks), entry.kind, entry.dtype, entry.elements)] += entry.number
    assert sent == real.sent


def rehearsed(tree: dict[str, Any], world: int, imbalance: float) -> list[Rehearsal]:
    """In a process of its own: it installs the CPU adapter."""
    from jetmoe_megatron.plan.rehearse import rehearse

    run = Run.model_validate(tree)
    layout = resolve_layout(run, world)
    return [rehearse(run, layout, rank, "cpu", imbalance) for rank in range(world)]
