from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from jetmoe_megatron.config import load_run
from jetmoe_megatron.config.layout import resolve_layout
from jetmoe_megatron.config.learning_rate_shapes import LEARNING_RATES
from jetmoe_megatron.training.learning_rate import LearningRate

JETMOE = LearningRate(
    max_lr=5e-4,
    warmup_tokens=10 * 10**9,
    initial_lr_ratio=0.1,
    final_lr_ratio=0.1,
    phases=[(10**12, "constant"), (250 * 10**9, "exponential")],
)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (0, 5e-5),  # "initial and final learning rates are set to 10% of the maximum"
        (5 * 10**9, 2.75e-4),
        (10 * 10**9, 5e-4),
        (600 * 10**9, 5e-4),
        (10**12 - 1, 5e-4),
        (10**12, 5e-4),
        (10**12 + 62_500_000_000, 2.8117e-4),  # a quarter of the decay: 5e-4 * 0.1 ** 0.25
        (10**12 + 125 * 10**9, 1.5811e-4),
        (10**12 + 187_500_000_000, 8.8914e-5),
        (1250 * 10**9, 5e-5),
        (2000 * 10**9, 5e-5),
    ],
)
def test_published_recipe(tokens: int, expected: float) -> None:
    assert JETMOE(tokens) == pytest.approx(expected, rel=1e-4)


def test_decay_is_geometric_not_a_line() -> None:
    points = [JETMOE(10**12 + i * 25 * 10**9) for i in range(11)]
    ratios = [b / a for a, b in pairwise(points)]
    assert max(ratios) == pytest.approx(min(ratios), rel=1e-9)


def test_phases_go_on_from_where_the_one_before_ended() -> None:
    rate = LearningRate(1.0, 0, 0.1, 0.5, [(100, "exponential"), (100, "constant"), (100, "exponential")])
    assert [rate(t) for t in (0, 100, 150, 200, 250, 300)] == pytest.approx([1, 0.5, 0.5, 0.5, 0.5**1.5, 0.25])


def test_the_shape_spans_whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "OUTPUT"):
        monkeypatch.setenv(name, "/data")
    run = load_run(Path("configs/jetmoe_8b/run.yaml"))
    layout = resolve_layout(run, 96)
    assert layout.phase_steps == (238_419, 59_605)  # rounded up
    rate = LearningRate.of(run, layout)
    end_of_stable = 238_419 * 4_194_304
    assert rate(end_of_stable) == 5e-4
    assert rate(end_of_stable + 59_605 * 4_194_304) == pytest.approx(5e-5)


def test_a_shape_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def rate(shape: str) -> LearningRate:
        return replace(JETMOE, phases=[(10**12, "constant"), (250 * 10**9, shape)])

    with pytest.raises(KeyError, match="linear"):
        rate("linear")(10**12)
    monkeypatch.setitem(LEARNING_RATES, "linear", lambda progress, final: 1 - (1 - final) * progress)
    assert rate("linear")(10**12 + 125 * 10**9) == pytest.approx(5e-4 * 0.55)
