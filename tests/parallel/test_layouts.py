"""Every layout computes the same model: losses of three steps, every gradient, and the weights afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parallel.oracle import Outcome, outcome, relative_error
from tests.support import small_run

DATA = {"code": "unused", "prose": "unused"}
# (ranks, parallel section, further changes); names are what pytest shows
LAYOUTS: dict[str, tuple[int, dict[str, int], dict[str, Any]]] = {
    "dp2": (2, {}, {}),
    "tp2": (2, {"tensor": 2}, {}),
    "tp2 etp2": (2, {"tensor": 2, "expert_tensor": 2}, {}),
    "pp2": (2, {"pipeline": 2}, {}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "ep2": (2, {"expert": 2}, {}),
    "tp2 ep2 pp2": (4, {"tensor": 2, "expert": 2, "pipeline": 2}, {}),
}


def run_tree(**changes: Any) -> dict[str, Any]:
    # Adam turns the rounding of a gradient near zero into a step of full size unless eps is well above it.
    optimizer = {"max_lr": 1e-2, "eps": 1e-3, "clip_grad": 0.0}
    return small_run(Path("unused"), DATA, model__num_layers=4, model__init_std=0.2, optimizer=optimizer, **changes)


@pytest.fixture(scope="module")
def one_process() -> Outcome:
    return outcome(run_tree(), ranks=1)


@pytest.mark.parametrize(("ranks", "parallel", "changes"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_equals_one_process(
    ranks: int, parallel: dict[str, int], changes: dict[str, Any], one_process: Outcome
) -> None:
    split = outcome(run_tree(parallel=parallel, **changes), ranks)
    for step, (ours, truth) in enumerate(zip(split.losses, one_process.losses, strict=True)):
        assert ours == pytest.approx(truth, rel=1e-5), f"step {step + 1}"
    assert split.gradients.keys() == one_process.gradients.keys()
    for name, truth in one_process.gradients.items():
        error = relative_error(split.gradients[name], truth)
        assert error < 1e-5, f"gradient of {name}: relative error {error:.1e}"
    for name, truth in one_process.weights.items():
        error = relative_error(split.weights[name], truth)
        assert error < 1e-4, f"{name} after three steps: relative error {error:.1e}"
