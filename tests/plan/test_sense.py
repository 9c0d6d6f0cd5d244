"""What holds for every plan, whatever its figures are."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from data_tools.parallel import WorkerProcesses
from jetmoe_megatron.plan.estimate import bytes_needed, estimate
from jetmoe_megatron.plan.plan import Plan, make_plan
from tests.plan.small_plans import hardware, processes, run

__all__ = ["processes"]
GPU = hardware()
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "pipeline, some data": (6, {"parallel": {"pipeline": 2}, "batch__global_tokens": 768}),
    "virtual stages": (2, {"parallel": {"pipeline": 2, "virtual_pipeline": 2}}),
    "uneven stages": (2, {"parallel": {"pipeline": 2, "layers_per_stage": [3, 1]}}),
    "tensor, expert tensor": (4, {"parallel": {"tensor": 2, "expert_tensor": 2}}),
    "experts over nodes": (4, {"parallel": {"expert": 4, "attention_experts": "sharded"}}),
    "overlaps": (4, {"parallel": {"pipeline": 2, "overlap_grad_reduce": True, "overlap_param_gather": True}}),
    "fp32": (2, {"parallel": {"expert": 2}, "precision": "fp32"}),
}
NAMES = pytest.mark.parametrize("name", LAYOUTS)


@pytest.fixture
def plan(processes: WorkerProcesses) -> Any:
    def made(name: str, imbalance: float = 1.0, parallel: dict[str, Any] | None = None, **changes: Any) -> Plan:
        gpus, own = LAYOUTS[name]
        tree = {**own, **changes, "parallel": {**own.get("parallel", {}), **(parallel or {})}}
        return make_plan(run(**tree), gpus, GPU, imbalance, processes)

    return made


@NAMES
def test_parts_add_up(name: str, plan: Any) -> None:
    found = plan(name)
    one = found.estimate
    assert one.step_seconds >= max(stage.busy for stage in one.stages) * (1 - 1e-9)
    assert found.stage(found.slowest).busy + one.bubble * one.step_seconds == pytest.approx(one.step_seconds)
    for spans in one.timeline:
        assert all(a.end <= b.start + 1e-12 for a, b in pairwise(spans))
    hours = found.layout.steps * one.step_seconds / 3600
    assert one.dollars == pytest.approx(found.layout.world * hours * GPU.dollars_per_gpu_hour)
    assert one.days == pytest.approx(hours / 24)
    assert 0 < one.mfu <= one.mfu_with_attention < 1


@NAMES
def test_worse_hardware_is_never_faster(name: str, plan: Any) -> None:
    found = plan(name)
    rates = [key for key, value in GPU.model_dump().items() if key.endswith(("_second", "_tflops"))]
    for key in rates:
        worse = GPU.model_copy(update={key: getattr(GPU, key) / 3})
        slow = estimate(found.run, found.layout, worse, found.world)
        assert slow.step_seconds >= found.estimate.step_seconds, key


@NAMES
def test_a_fuller_expert_takes_no_less(name: str, plan: Any) -> None:
    plans = [plan(name, imbalance) for imbalance in (1.0, 1.5, 2.0)]
    check_grows([one.estimate.step_seconds for one in plans])
    check_grows([bytes_needed(GPU, one.fullest) for one in plans])


@NAMES
def test_what_saves_memory_saves_memory(name: str, plan: Any) -> None:
    check_grows([needed(plan(name, recompute=kind)) for kind in ("full", "selective", "none")])
    check_grows([needed(plan(name, batch__micro_sequences=number)) for number in (1, 2)])
    if "overlap_param_gather" not in LAYOUTS[name][1].get("parallel", {}):
        check_grows([needed(plan(name, parallel={"distributed_optimizer": use})) for use in (True, False)])


def needed(plan: Plan) -> float:
    return bytes_needed(GPU, plan.fullest)


def check_grows(figures: list[float]) -> None:
    assert figures == sorted(figures), figures
