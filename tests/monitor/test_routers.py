"""The numbers of routers.jsonl and their summary."""

from __future__ import annotations

import json
import math

import pytest

from jetmoe_megatron.monitor.routers import RouterMetrics, line, summary

EVEN, ONE_DEAD = [8.0, 8.0, 8.0, 8.0], [16.0, 10.0, 6.0, 0.0]


def of(count_LE: list[list[float]]) -> RouterMetrics:
    """Two experts for each token, so of 16 tokens in two micro-batches."""
    layers = len(count_LE)
    undecided, sure, losses = [16 * math.log(4)] * layers, [4.0] * layers, [2.5] * layers
    return RouterMetrics.of(3, 2, count_LE, undecided, sure, losses, losses, [2.0] * layers)


def test_of_each_layer() -> None:
    metrics = of([EVEN, ONE_DEAD])
    assert metrics.load_LE == [[1, 1, 1, 1], [2, 1.25, 0.75, 0]]
    assert metrics.gate_entropy_L == pytest.approx([1, 1]) and metrics.top1_margin_L == [0.25, 0.25]
    assert metrics.balance_loss_L == metrics.z_loss_L == [1.25, 1.25]


def test_a_line() -> None:
    metrics = {"moa": of([EVEN, EVEN]), "moe": of([EVEN, ONE_DEAD])}
    written = json.loads(json.dumps(line(40, 1000, metrics)))
    assert written == {
        "step": 40,
        "tokens": 1000,
        "steps": 3,
        "moa_load": [[1, 1, 1, 1], [1, 1, 1, 1]],
        "moe_load": [[1, 1, 1, 1], [2, 1.25, 0.75, 0]],
        **{
            f"{kind}_{name}": [value, value]
            for kind in ("moa", "moe")
            for name, value in (("gate_entropy", 1), ("top1_margin", 0.25), ("balance_loss", 1.25), ("z_loss", 1.25))
        },
    }


def test_the_summary_is_of_the_worst_layer() -> None:
    found = summary({"moa": of([EVEN, EVEN]), "moe": of([EVEN, ONE_DEAD, EVEN])})
    shares = [16 / 32, 10 / 32, 6 / 32]
    assert found == {
        "routers/moa/load_max": 1,
        "routers/moa/load_min": 1,
        "routers/moa/load_cv": 0,
        "routers/moa/load_entropy": pytest.approx(1),
        "routers/moa/dead_experts": 0,
        "routers/moa/gate_entropy": pytest.approx(1),
        "routers/moa/top1_margin": 0.25,
        "routers/moe/load_max": 2,
        "routers/moe/load_min": 0,
        "routers/moe/load_cv": pytest.approx(math.sqrt((1 + 0.25**2 + 0.25**2 + 1) / 4)),
        "routers/moe/load_entropy": pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(4)),
        "routers/moe/dead_experts": 1,
        "routers/moe/gate_entropy": pytest.approx(1),
        "routers/moe/top1_margin": 0.25,
    }


def test_a_single_expert() -> None:
    metrics = RouterMetrics.of(1, 1, [[5.0]], [0.0], [5.0], [1.0], [1.0], [1.0])
    assert metrics.gate_entropy_L == [0] and metrics.load_LE == [[1]]
    assert summary({"moa": metrics})["routers/moa/load_entropy"] == 1
