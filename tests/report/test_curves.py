"""What is left of a curve when it is thinned."""

from __future__ import annotations

import math
import random

import pytest

from jetmoe_megatron.report.curves import Curves
from tests.report.run_folders import TOKENS


def curves_of(values: list[float | None], most_bins: int = 100) -> Curves:
    """None: the line has no such key."""
    curves = Curves(most_bins)
    for step, value in enumerate(values, start=1):
        curves.add_line({"step": step, "tokens": TOKENS * step, **({} if value is None else {"x": value})})
    return curves


def test_few_lines_stay_as_they_are() -> None:
    values = [random.Random(step).random() for step in range(100)]
    curves = curves_of([*values])
    assert curves.steps == list(range(1, 101)) and curves.dump("x") == {"mean": values}


@pytest.mark.parametrize("lines", [101, 257, 1000, 6401])
def test_many_lines(lines: int) -> None:
    """Each bin has the least, the most and the mean of its lines: a spike of one step is not lost."""
    values = [random.Random(step).gauss(2, 0.1) for step in range(lines)]
    values[lines // 3], values[lines // 2] = 1e6, -1e6
    curves = curves_of([*values])
    assert 50 <= len(curves.steps) <= 100 and curves.steps[-1] == lines
    dumped, begin = curves.dump("x"), 0
    for number, end in enumerate(curves.steps):
        assert curves.tokens[number] == TOKENS * end
        own = values[begin:end]
        wanted = {"low": min(own), "high": max(own), "mean": sum(own) / len(own)}
        assert {key: dumped[key][number] for key in wanted} == pytest.approx(wanted, rel=1e-5)
        begin = end
    assert max(dumped["high"]) == 1e6 and min(dumped["low"]) == -1e6


def test_what_is_no_number_makes_a_gap() -> None:
    values: list[float | None] = [1.0, math.nan, 3.0, math.inf, 5.0]
    assert curves_of(values).dump("x") == {"mean": [1.0, None, 3.0, None, 5.0], "gaps": [1, 3]}
    thinned = curves_of([math.nan if step in (7, 77) else float(step) for step in range(200)], most_bins=50).dump("x")
    assert len(thinned["mean"]) == 50 and thinned["gaps"] == [1, 19]
    assert [(thinned["low"][i], thinned["high"][i]) for i in (1, 19)] == [(4, 6), (76, 79)]


def test_a_missing_key_is_no_gap() -> None:
    curves = curves_of([None, 1.0, None, None, 2.0, None])
    assert curves.dump("x") == {"mean": [1.0, 2.0], "at": [1, 4]}
    sparse = curves_of([float(step) if step % 50 == 0 else None for step in range(400)], most_bins=100)
    steps = range(0, 400, 50)
    assert sparse.dump("x") == {"mean": [float(step) for step in steps], "at": [step // 4 for step in steps]}


def test_text_and_lists_are_no_numbers() -> None:
    curves = Curves()
    curves.add_line({"step": 1, "tokens": 1, "a": "1", "b": [1], "c": None, "d": True, "e": 2})
    assert set(curves.of) == {"step", "tokens", "e"}
