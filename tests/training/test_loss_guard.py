"""The rule of the loss guard, and that a skipped step changes nothing at all."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jetmoe_megatron.config.schema import Guard as Options
from jetmoe_megatron.training.loss_guard import Guard
from tests.injected_faults import Fault, install
from tests.parallel.oracle import training
from tests.ranks import run_ranks
from tests.support import small_run

NAN, INF = math.nan, math.inf


def steady(window: int = 8, **options: Any) -> Guard:
    """A guard with a full window: losses around 4, norms around 1."""
    guard = Guard(Options(window=window, **options))
    for step in range(1, window + 1):
        assert guard.judge(step, "stable", 4 + 0.01 * (step % 5), 1 + 0.1 * (step % 3)) is None
    return guard


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (NAN, 1.0, "lm_loss is nan"),
        (INF, 1.0, "lm_loss is inf"),
        (4.0, NAN, "grad_norm is nan"),
        (4.0, INF, "grad_norm is inf"),
        (NAN, NAN, "lm_loss is nan"),
        (9.0, 1.0, "lm_loss 9 is a spike"),
        (4.0, 50.0, "grad_norm 50 is a spike"),
        (4.03, 1.3, None),
        (2.0, 0.01, None),  # down is no spike
        (4.0, 0.0, None),
    ],
)
def test_what_is_bad(loss: float, norm: float, reason: str | None) -> None:
    found = steady().judge(9, "stable", loss, norm)
    assert (found is None) == (reason is None) and (reason or "") in (found or "")


def test_the_limit_is_where_the_formula_says() -> None:
    guard = steady(spike_factor=5.0)
    window = np.array(guard.losses)
    limit = np.median(window) + 5 * 1.4826 * np.median(abs(window - np.median(window)))
    assert guard.judge(9, "stable", limit + 1e-9, 1.0)
    assert guard.judge(10, "stable", limit - 1e-9, 1.0) is None


def test_no_spike_without_a_full_window_of_the_phase_nor_when_switched_off() -> None:
    guard = steady()
    assert guard.judge(9, "decay", 9.0, 1.0) is None
    for step in range(10, 17):
        guard.judge(step, "decay", 9.0 + 0.01 * (step % 3), 1.0 + 0.1 * (step % 3))
    assert guard.judge(17, "decay", 20.0, 1.0)
    assert steady(spike_factor=0.0).judge(9, "stable", 1e9, 1e9) is None
    assert steady(spike_factor=0.0).judge(9, "stable", NAN, 1.0)


def test_a_bad_step_does_not_enter_the_window() -> None:
    guard = steady()
    before = guard.dump()
    assert guard.judge(9, "stable", 9.0, 1.0)
    assert {**guard.dump(), "bad": []} == before


def test_the_budget_counts_within_the_window() -> None:
    guard = steady(budget=2, spike_factor=0.0, on_bad_step="skip")
    actions = []
    for step in range(9, 30):
        guard.judge(step, "stable", NAN if step in (9, 10, 18, 19, 20) else 4.0, 1.0)
        actions.append((step, guard.action))
    assert next(step for step, action in actions if action == "stop") == 20
    assert guard.judge(21, "stable", 4.0, 1.0) is None


def test_a_resumed_guard_decides_as_one_that_ran_on() -> None:
    random = np.random.default_rng(7)
    steps = [
        (step, "stable" if step < 60 else "decay", float(loss), float(norm))
        for step, (loss, norm) in enumerate(zip(3 + random.standard_t(2, 120) / 9, random.lognormal(size=120)))  # noqa: B905
    ]
    steps[40] = (40, "stable", NAN, 1.0)
    options = Options(window=8, spike_factor=3.0, budget=3)
    guard = Guard(options)
    whole = [(guard.judge(*step), guard.action) for step in steps]
    assert {None} < {reason for reason, _ in whole} and {"skip", "stop"} == {action for _, action in whole}
    for cut in range(len(steps)):
        first = Guard(options)
        parts = [(first.judge(*step), first.action) for step in steps[:cut]]
        second = Guard.load(options, json.loads(json.dumps(first.dump())))
        parts += [(second.judge(*step), second.action) for step in steps[cut:]]
        assert parts == whole


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "data, distributed optimizer": (2, {}),
    "data, bf16": (2, {"precision": "bf16"}),
    "data, each its own optimizer": (2, {"precision": "bf16", "parallel__distributed_optimizer": False}),
    "overlap": (2, {"parallel__overlap_grad_reduce": True, "parallel__overlap_param_gather": True}),
    "tensor": (2, {"parallel__tensor": 2}),
    "pipeline": (2, {"parallel__pipeline": 2}),
    "expert": (2, {"parallel__expert": 2}),
    "tensor, pipeline, expert": (
        4,
        {"parallel__tensor": 2, "parallel__pipeline": 2, "parallel__expert": 2, "precision": "bf16"},
    ),
}


@pytest.mark.parametrize(
    "name",
    LAYOUTS,
)
def test_a_skipped_step_leaves_weights_and_moments_bit_identical(name: str, data: dict[str, str]) -> None:
    """And all ranks skip the same steps: after a NaN that reaches all, and after one that one rank has alone."""
    ranks, changes = LAYOUTS[name]
    faults = [Fault("gradient", 2), Fault("loss", 3, rank=ranks - 1), Fault("reduced gradients", 5, rank=ranks - 1)]
    if name == "overlap":  # which has sent most gradients when this fault comes
        faults = faults[1:]
    results = run_ranks(ranks, skip_and_compare, small_run(Path("unused"), data, **changes), faults)
    for reasons, changed in results:
        assert reasons == results[0][0] and set(reasons) == {fault.step for fault in faults}
        assert changed == [step not in reasons for step in range(1, 7)]


def skip_and_compare(tree: dict[str, Any], faults: list[Fault]) -> tuple[dict[int, str], list[bool]]:
    """What each bad step was, and which of the steps changed anything."""
    install(faults)
    with training(tree, 6) as (run, model, batches_of_steps):
        from jetmoe_megatron.training.metrics import reduce_metrics
        from jetmoe_megatron.training.optimizer import build_optimizer, settle_weights
        from jetmoe_megatron.training.step import compute_gradients, update_weights

        optimizer = build_optimizer(run, model)
        guard = Guard(run.guard)
        reasons, changed = {}, []
        for step, batches in enumerate(batches_of_steps, 1):
            settle_weights(model)
            before = everything(model, optimizer)
            losses, norm = compute_gradients(model, optimizer, batches)
            metrics, _ = reduce_metrics(model, losses, norm, data_wait=0.0, stop=False)
            if reason := guard.judge(step, "", metrics.lm_loss, metrics.grad_norm):
                reasons[step] = reason
            else:
                update_weights(optimizer, norm, 1e-2)
            settle_weights(model)
            after = everything(model, optimizer)
            same = len(before) == len(after) and all(a.equal(b) for a, b in zip(before, after, strict=True))
            changed.append(not same)
        return reasons, changed


def everything(model: list[Any], optimizer: Any) -> list[Any]:
    """Copies of all weights, master weights, moments and step counts of this rank."""
    found = [parameter for chunk in model for parameter in chunk.parameters()]
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                found += [parameter, *(state[key] for key in ("exp_avg", "exp_avg_sq", "step") if key in state)]
    return [tensor.detach().clone() for tensor in found]
