"""The largest models that fit, against plans of deeper ones."""

from __future__ import annotations

import pytest

from data_tools.parallel import WorkerProcesses
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.plan.fit import MOST_LAYERS, fit_table, largest_models, with_shape
from jetmoe_megatron.plan.plan import make_plan
from tests.plan.small_plans import hardware, processes, run

__all__ = ["processes"]


def test_the_deepest_models_fit_and_deeper_ones_do_not(processes: WorkerProcesses) -> None:
    own, small = run(parallel={"pipeline": 2}), hardware(memory_gb=0.004)
    plans = largest_models(own, 2, small, 1.0, processes, lambda *progress: None)
    assert len({plan.run.model.hidden_size for plan in plans}) == len(plans) >= 2
    for plan in plans:
        layers, width = plan.run.model.num_layers, plan.run.model.hidden_size / own.model.hidden_size
        assert plan.verdict == "fits" and layers % 2 == 0
        if layers < MOST_LAYERS:
            assert make_plan(with_shape(own, width, layers + 2), 2, small, processes=processes).verdict != "fits"
    assert len(list(fit_table(plans))) == len(plans) + 3


def test_nothing_fits(processes: WorkerProcesses) -> None:
    assert largest_models(run(), 1, hardware(1e-6), 1.0, processes, lambda *progress: None) == []


def test_a_layout_that_cannot_be(processes: WorkerProcesses) -> None:
    with pytest.raises(UserError, match="does not divide the world of 3 ranks"):
        largest_models(run(parallel={"pipeline": 2}), 3, hardware(), 1.0, processes, lambda *progress: None)
