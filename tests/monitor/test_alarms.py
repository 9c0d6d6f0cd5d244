"""Each alarm is raised once by what it is for, and by nothing else."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from jetmoe_megatron.config import Run
from jetmoe_megatron.monitor.alarms import Alarms
from jetmoe_megatron.monitor.routers import line
from tests.parallel.oracle import outcome
from tests.parallel.test_equal_to_one_process import run_tree
from tests.support import metrics, pretrain, small_run, write_run


def alarms(every: int = 20, **limits: Any) -> Alarms:
    logging = {"router_every_steps": every}
    tree = small_run(Path("unused"), {"code": "c", "prose": "p"}, alarms=limits, logging=logging)
    return Alarms(Run.model_validate(tree))


def record(step: int, **changes: Any) -> dict[str, Any]:
    numbers = {"lm_loss": 3.0, "data_wait_seconds": 0.0, "step_seconds": 1.0, "moa_z_loss": 2.0, "moe_z_loss": 2.0}
    return {"step": step, **numbers, **changes}


def routers(**changes: Any) -> dict[str, Any]:
    healthy = {"load": [[1.0, 1.0, 1.0, 1.0], [1.2, 0.8, 1.0, 1.0]], "gate_entropy": [0.9, 0.8]}
    return {
        "steps": 20,
        **{f"{kind}_{key}": value for kind in ("moa", "moe") for key, value in healthy.items()},
    } | changes


def raised(judge: Alarms, records: list[dict[str, Any]], lines: dict[int, dict[str, Any]] | None = None) -> list[Any]:
    """(step, alarm) in their order."""
    with_lines = [{**r, "routers": line} if (line := (lines or {}).get(r["step"])) else r for r in records]
    return [(r["step"], name) for r in with_lines for name in judge.judge(r)]


def test_a_healthy_run_raises_none() -> None:
    steps = [record(step, lm_loss=3 - step / 100, moe_z_loss=10 / (1 + step)) for step in range(1, 201)]
    for step in (50, 100, 150):
        steps[step - 1]["held_out_loss"] = 3 - step / 100
    assert raised(alarms(), steps, {step: routers() for step in range(20, 201, 20)}) == []


@pytest.mark.parametrize(
    ("name", "changes", "said", "off"),
    [
        (
            "dead_expert/moe",
            {"moe_load": [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 0.0, 0.0]]},
            "no token in 20 steps for expert 2 of layer 1, 3 of layer 1",
            {"dead_experts": False},
        ),
        (
            "load/moa",
            {"moa_load": [[3.1, 0.3, 0.3, 0.3], [1, 1, 1, 1]]},
            "one expert takes over 3 times an even share: layer 0 (3.10)",
            {"load": None},
        ),
        (
            "gate_entropy/moe",
            {"moe_gate_entropy": [0.5, 0.04]},
            "below 0.05 of its largest value: layer 1 (0.040)",
            {"gate_entropy": None},
        ),
    ],
)
def test_of_routers(name: str, changes: dict[str, Any], said: str, off: dict[str, Any]) -> None:
    """Raised when it begins, and once more after it was well."""
    bad, well = routers(**changes), routers()
    lines = {20: well, 40: bad, 60: bad, 80: well, 100: bad}
    steps = [record(step) for step in range(1, 101)]
    found = raised(alarms(), steps, lines)
    assert found == [(40, name), (100, name)]
    assert alarms().judge(record(1, routers=bad))[name] == said
    assert raised(alarms(**off), steps, lines) == []
    assert raised(alarms(), steps, {40: bad | {"steps": 19}}) == []  # after a start, or at a stop


def test_waits_for_data() -> None:
    steps = [record(step, data_wait_seconds=0.3 if 100 < step <= 120 else 0.0) for step in range(1, 301)]
    assert raised(alarms(), steps) == [(109, "data_wait")]  # 9 of 50 steps: 5.4%
    assert raised(alarms(data_wait=None), steps) == []


@pytest.mark.parametrize(
    ("ranks", "ratio", "expected"),
    [
        ([3] * 100, 1.2, [(50, "slow_rank")]),
        ([3] * 100, 1.05, []),
        ([1, 2, 3, 0] * 25, 1.2, []),  # noise: now one and now another
        ([3, 3, 3, 3, 3, 3, 3, 3, 3, 0] * 10, 1.2, [(50, "slow_rank")]),
    ],
)
def test_a_slow_rank(ranks: list[int], ratio: float, expected: list[Any]) -> None:
    steps = [record(step, slowest_rank=rank, slowest_rank_ratio=ratio) for step, rank in enumerate(ranks, start=1)]
    assert raised(alarms(), steps) == expected
    assert raised(alarms(slow_rank=None), steps) == []


def test_z_loss_grows() -> None:
    steps = [record(step, moa_z_loss=math.exp(abs(step - 200) / 50)) for step in range(1, 401)]
    ((step, name),) = raised(alarms(), steps)
    assert name == "z_loss/moa" and 250 < step < 320
    assert raised(alarms(z_loss=None), steps) == []
    steps[229] |= {"moa_z_loss": math.nan, "skipped": "moa_z_loss is nan"}
    assert raised(alarms(), steps) == [(230, "bad_step"), (step, "z_loss/moa")]


@pytest.mark.parametrize(("training", "expected"), [(-0.01, [(150, "held_out_loss")]), (0.01, [])])
def test_held_out_loss_rises(training: float, expected: list[Any]) -> None:
    """While the training loss falls, and not while it rises too."""
    steps = [record(step, lm_loss=3 + step * training) for step in range(1, 151)]
    for step in (50, 100, 150):
        steps[step - 1]["held_out_loss"] = 3 + step / 1000
    assert raised(alarms(), steps) == expected


def test_a_bad_step() -> None:
    steps = [record(1), record(2, skipped="lm_loss is nan", lm_loss=math.nan), record(3)]
    assert raised(alarms(), steps) == [(2, "bad_step")]


def leave_out_expert_0(model: list[Any]) -> None:
    """The others are in pairs of opposite weights: of each pair, one has a logit above zero."""
    from jetmoe_megatron.model.router import routers

    *_, router = routers(model)
    with torch.no_grad():
        router.weight[0] = 0
        router.weight[2], router.weight[4] = -router.weight[1], -router.weight[3]


def test_a_planted_dead_expert() -> None:
    tree = run_tree(model__num_experts=5)
    found = outcome(tree, ranks=2, steps=1, prepare=leave_out_expert_0).routers
    said = alarms(every=1).judge(record(1, routers=line(1, 256, found)))
    assert said == {"dead_expert/moe": "no token in 1 steps for expert 0 of layer 3"}


def test_of_a_real_run(tmp_path: Path, data: dict[str, str]) -> None:
    tree = small_run(tmp_path, data, alarms={"gate_entropy": 1.0}, logging={"router_every_steps": 4})
    result = pretrain(1, write_run(tmp_path, tree))
    assert result.returncode == 0
    by_step = {r["step"]: r["alarms"] for r in metrics(tmp_path / "run") if "alarms" in r}
    assert list(by_step) == [4] and set(by_step[4]) >= {"gate_entropy/moa", "gate_entropy/moe"}
    for name, message in by_step[4].items():
        assert f"alarm: step 4: {name}: {message}\n" in result.stderr
