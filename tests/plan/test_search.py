"""The search against all layouts there are."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
import yaml

from data_tools.parallel import WorkerProcesses
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.plan.estimate import bytes_needed
from jetmoe_megatron.plan.plan import make_plan, plan_ends
from jetmoe_megatron.plan.search import Found, search
from jetmoe_megatron.plan.search_text import search_text
from jetmoe_megatron.plan.settings import Settings, legal
from tests.plan.small_plans import hardware, processes, run, run_tree

__all__ = ["processes"]
RUN = run(model__num_layers=2)


@pytest.fixture(scope="module")
def found(processes: WorkerProcesses) -> Found:
    return searched(processes, 80)


def searched(processes: WorkerProcesses, memory_gb: float) -> Found:
    done: list[tuple[int, int]] = []
    found = search(RUN, 4, hardware(memory_gb), 1.0, processes, lambda *progress: done.append(progress), most=24)
    assert done[-1][0] == len(found.tried) <= done[-1][1]
    return found


@pytest.mark.slow
def test_the_best_of_all_layouts_is_found(processes: WorkerProcesses, found: Found) -> None:
    sizes = product((1, 2), (1, 2), (1,), (1, 2, 4), (1, 2), ("replicated", "sharded"), (1, 2, 4, 8))
    every = [Settings(*size, recompute) for size in sizes for recompute in ("none", "selective", "full")]
    every = [settings for settings in every if settings.is_distinct and legal(RUN, settings, 4)]
    cases = [(settings.apply(RUN), layout) for settings in every if (layout := legal(RUN, settings, 4))]
    plans = list(plan_ends(cases, hardware(), 1.0, processes))
    needed = sorted(bytes_needed(plan.hardware, plan.fullest) for plan in plans)
    assert len(plans) > 3 * len(found.tried)
    assert found.best[0].seconds == min(plan.estimate.step_seconds for plan in plans)  # all fit
    little = needed[len(needed) // 2] / 1e9
    fitting = [plan for plan in plans if bytes_needed(plan.hardware, plan.fullest) <= 0.9 * little * 1e9]
    best = searched(processes, little).best[0]
    assert best.seconds == pytest.approx(min(plan.estimate.step_seconds for plan in fitting), rel=0.02), best.settings


def test_what_it_says(found: Found) -> None:
    text = "\n".join(search_text(RUN, found))
    assert found.own is not None and found.own.fits
    assert "\n1. " in text and "\n5. " in text and "\n6. " not in text
    assert "     parallel: {" in text and "     batch: {sequence_length: " in text
    assert "Beside the first, " in text and "None is a measurement." in text
    seconds = [one.seconds for one in found.best]
    assert seconds == sorted(seconds)


def test_layouts_without_room_for_their_weights_are_not_rehearsed(processes: WorkerProcesses) -> None:
    found = searched(processes, 3e-5)
    assert not found.best and all(one.plan is None for one in found.tried)
    text = "\n".join(search_text(RUN, found))
    assert "No layout that was looked at fits" in text and "The run as it is does not fit." in text


def test_no_layout_divides_the_gpus(processes: WorkerProcesses) -> None:
    with pytest.raises(UserError, match=r"--gpus: no layout of this run's model and batch divides 7 GPUs"):
        search(RUN, 7, hardware(), 1.0, processes, lambda *progress: None)


@pytest.mark.parametrize(
    ("changes", "imbalance"),
    [
        ({"tensor": 2, "distributed_optimizer": False}, 1.0),
        ({"pipeline": 4, "tensor": 1}, 1.0),
        ({"pipeline": 2, "layers_per_stage": [1, 3], "overlap_grad_reduce": True}, 1.5),
    ],
)
def test_its_lines_are_a_run_of_the_same_figures(
    changes: dict[str, Any], imbalance: float, processes: WorkerProcesses
) -> None:
    """Whatever the run file says, also where it is not the default."""
    tree = run_tree(parallel=changes)
    own = Run.model_validate(tree)
    found = search(own, 4, hardware(), imbalance, processes, lambda *progress: None, most=16)
    text = "\n".join(search_text(own, found))
    printed = [part.splitlines()[1:] for part in re.split(r"\n\d\. ", text)[1:]]
    printed = [[line for line in lines if line.startswith("     ")] for lines in printed]
    assert len(printed) == 5
    for lines, one in zip(printed, found.best, strict=False):
        plan = make_plan(
            Run.model_validate(tree | yaml.safe_load("\n".join(lines))), 4, hardware(), imbalance, processes
        )
        assert plan.estimate.step_seconds == one.seconds and one.plan is not None
        assert bytes_needed(hardware(), plan.fullest) == bytes_needed(hardware(), one.plan.fullest)


@pytest.mark.parametrize("parallel", [{"pipeline": 4}, {"pipeline": 4, "expert": 2}, {"tensor": 2, "pipeline": 2}])
def test_the_ends_of_a_pipeline_stand_for_all_of_it(parallel: dict[str, Any], processes: WorkerProcesses) -> None:
    own = run(parallel=parallel, model__num_layers=8)
    layout = resolve_layout(own, 8)
    (found,), whole = (
        plan_ends([(own, layout)], hardware(), 1.5, processes),
        make_plan(own, 8, hardware(), 1.5, processes),
    )
    assert found.left == whole.left and len(found.world) <= len(whole.world)
    assert whole.estimate.step_seconds <= found.estimate.step_seconds < 1.1 * whole.estimate.step_seconds
