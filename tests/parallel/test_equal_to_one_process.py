"""Every layout computes the same model: losses of three steps, every gradient, the weights afterwards, and what is
recorded of each router.

The reference is one process with plain AdamW and no recomputation. It has one micro-batch where the split into
micro-batches does not matter.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parallel.oracle import Outcome, outcome, relative_error, router_gradients
from tests.support import small_run

DATA = {"code": "unused", "prose": "unused"}
GLOBAL = {"losses": {"balance": 0.1, "z": 0.01, "scope": "global_batch"}}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
# name: (ranks, parallel section, further changes)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "dp2, distributed optimizer": (2, {}, {}),
    "tp2": (2, {"tensor": 2}, {}),
    "tp2 etp2": (2, {"tensor": 2, "expert_tensor": 2}, {}),
    "pp2, layers 1 and 3": (2, {"pipeline": 2, "layers_per_stage": [1, 3]}, {}),
    "pp2 vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
    "pp2 vpp2, a group of 3 micro-batches": (2, {"pipeline": 2, "virtual_pipeline": 2}, {"batch__global_tokens": 192}),
    "pp2 vpp2, groups of 3 and 2": (2, {"pipeline": 2, "virtual_pipeline": 2}, {"batch__global_tokens": 320}),
    "ep2": (2, {"expert": 2}, {}),
    "ep2, attention experts sharded": (2, {"expert": 2, "attention_experts": "sharded"}, {}),
    "recompute full": (1, {}, {"recompute": "full"}),
    "recompute selective, tp2": (2, {"tensor": 2}, {"recompute": "selective"}),
    "micro-batch split, global batch": (1, {}, {"batch__micro_sequences": 1, **GLOBAL}),
    "dp2, global batch": (2, {}, GLOBAL),
    "dp2, micro-batch split, masked loss": (
        2,
        {},
        {"batch__micro_sequences": 1, "data": {"mask_loss": True}, **GLOBAL},
    ),
    "tp2 ep2 pp2": (4, {"tensor": 2, "expert": 2, "pipeline": 2}, {}),
    "dp2": (2, {"distributed_optimizer": False}, {}),
    "dp4": (4, {}, {}),
    "dp2, overlap": (2, OVERLAP, {}),
    "pp2 dp2, overlap": (4, {"pipeline": 2, **OVERLAP}, {}),
    "pp2 vpp2 dp2, overlap": (4, {"pipeline": 2, "virtual_pipeline": 2, **OVERLAP}, {}),
    "pp4": (4, {"pipeline": 4}, {}),
    "tp2 dp2": (4, {"tensor": 2}, {}),
    "tp2 etp2 dp2": (4, {"tensor": 2, "expert_tensor": 2}, {}),
    "tp2 pp2": (4, {"tensor": 2, "pipeline": 2}, {}),
    "tp2 etp2 ep2": (4, {"tensor": 2, "expert_tensor": 2, "expert": 2}, {}),
    "tp2 etp2 ep2, attention experts sharded": (
        4,
        {"tensor": 2, "expert_tensor": 2, "expert": 2, "attention_experts": "sharded"},
        {},
    ),
    "tp2 ep4": (4, {"tensor": 2, "expert": 4}, {}),
    "ep4": (4, {"expert": 4}, {}),
    "ep4, attention experts sharded": (4, {"expert": 4, "attention_experts": "sharded"}, {}),
    "ep2 pp2": (4, {"expert": 2, "pipeline": 2}, {}),
    "ep2 etp2 pp2, attention experts sharded, recompute full": (
        8,
        {"tensor": 2, "expert_tensor": 2, "expert": 2, "pipeline": 2, "attention_experts": "sharded"},
        {"recompute": "full"},
    ),
    "tp2 pp2 vpp2 ep2": (4, {"tensor": 2, "pipeline": 2, "virtual_pipeline": 2, "expert": 2}, {}),
    "tp2 pp2 dp2 ep2, overlap": (8, {"tensor": 2, "pipeline": 2, "expert": 2, **OVERLAP}, {}),
    "recompute selective": (1, {}, {"recompute": "selective"}),
    "recompute full, pp2": (2, {"pipeline": 2}, {"recompute": "full"}),
    "recompute full, ep2": (2, {"expert": 2}, {"recompute": "full"}),
    "tp2 dp2, global batch": (4, {"tensor": 2}, {"batch__micro_sequences": 1, **GLOBAL}),
    "pp2 dp2, global batch": (4, {"pipeline": 2}, {"batch__micro_sequences": 1, **GLOBAL}),
    "ep2, global batch, recompute full": (2, {"expert": 2}, {"recompute": "full", **GLOBAL}),
    "loop backend, ep2": (2, {"expert": 2}, {"model__expert_backend": "loop"}),
}


def run_tree(**changes: Any) -> dict[str, Any]:
    # Adam turns the rounding of a gradient near zero into a step of full size unless eps is well above it.
    optimizer = {"max_lr": 1e-2, "eps": 1e-3, "clip_grad": 0.0}
    return small_run(Path("unused"), DATA, model__num_layers=4, model__init_std=0.2, optimizer=optimizer, **changes)


@functools.cache
def _one_process(changes: str) -> Outcome:
    return outcome(run_tree(parallel={"distributed_optimizer": False}, **json.loads(changes)), ranks=1)


def one_process(changes: dict[str, Any]) -> Outcome:
    """What no split may change: of the further changes only the losses, within one micro-batch for the global scope,
    what is masked, and the tokens of a step."""
    plain: dict[str, Any] = {}
    if "losses" in changes:
        plain = {"losses": {**changes["losses"], "scope": "micro_batch"}, "batch__micro_sequences": 8}
    plain |= {key: changes[key] for key in ("data", "batch__global_tokens") if key in changes}
    return _one_process(json.dumps(plain))


@pytest.mark.parametrize(("ranks", "parallel", "changes"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_equals_one_process(ranks: int, parallel: dict[str, Any], changes: dict[str, Any]) -> None:
    check_equal(outcome(run_tree(parallel=parallel, **changes), ranks), one_process(changes))


def test_widths_that_no_grouped_matmul_takes_on_a_rank() -> None:
    """4 divides those of the whole model. `auto` takes the loop on two ranks."""
    changes = {"model__ffn_hidden_size": 36, "model__kv_channels": 6}
    split = outcome(run_tree(parallel={"tensor": 2, "expert_tensor": 2}, **changes), ranks=2)
    check_equal(split, _one_process(json.dumps(changes)))


def check_equal(split: Outcome, truth: Outcome) -> None:
    for step, (ours, loss) in enumerate(zip(split.losses, truth.losses, strict=True)):
        assert ours == pytest.approx(loss, rel=1e-5), f"step {step + 1}"
    assert split.gradients.keys() == truth.gradients.keys()
    for name, expected in truth.gradients.items():
        error = relative_error(split.gradients[name], expected)
        assert error < 1e-5, f"gradient of {name}: relative error {error:.1e}"
    for name, expected in truth.weights.items():
        error = relative_error(split.weights[name], expected)
        assert error < 1e-4, f"{name} after three steps: relative error {error:.1e}"
    for kind, expected_metrics in truth.routers.items():
        for name, expected_values in asdict(expected_metrics).items():
            tolerance = 1e-12 if name == "load_LE" else 1e-5  # counts are equal
            np.testing.assert_allclose(
                getattr(split.routers[kind], name), expected_values, rtol=tolerance, err_msg=f"{kind} {name}"
            )


@functools.cache
def true_router_gradients() -> dict[str, Any]:
    return router_gradients(run_tree(parallel={"distributed_optimizer": False}), ranks=1)


@pytest.mark.parametrize(
    ("ranks", "parallel", "changes"),
    [
        pytest.param(4, {"tensor": 2, "expert": 2, "pipeline": 2}, {}, id="tp2 ep2 pp2"),
        pytest.param(1, {}, {"recompute": "full"}, id="recompute full"),
        pytest.param(2, {"tensor": 2}, {}, id="tp2"),
        pytest.param(2, {"pipeline": 2}, {}, id="pp2"),
        pytest.param(2, {"expert": 2, "attention_experts": "sharded"}, {}, id="ep2"),
        pytest.param(2, {}, {}, id="dp2"),
    ],
)
def test_each_loss_reaches_the_routers(ranks: int, parallel: dict[str, Any], changes: dict[str, Any]) -> None:
    """The language loss and both auxiliary losses apart: a wrong scale of a small one cannot hide in the sum."""
    ours, truth = router_gradients(run_tree(parallel=parallel, **changes), ranks), true_router_gradients()
    for loss in ("lm", "balance", "z"):
        assert len(truth[loss]) == 8  # two routers in each of four layers
        for name, expected in truth[loss].items():
            assert expected.abs().max() > 0
            error = relative_error(ours[loss][name], expected)
            assert error < 1e-5, f"{loss} on {name}: relative error {error:.1e}"
