"""Shares of a whole over time: what the time went into, and which data sets were read."""

from __future__ import annotations

from typing import Any

from jetmoe_megatron.report.curves import Curves

PART = "part/"  # keys of the parts of a line's time, as `table.spent_in` names them
_DATA_SET = "dataset_tokens/"
Stack = dict[str, list[float | None]]


def time_by_part(curves: Curves) -> Stack:
    """The share of each part in each bin; None where no time is known."""
    totals = {key.removeprefix(PART): [0.0] * len(curves.steps) for key in curves.of if key.startswith(PART)}
    for name, total in totals.items():
        for bin in curves.of[PART + name]:
            total[bin.number] = max(bin.total, 0.0)
    return _shares(totals)


def data_sets(curves: Curves) -> Stack:
    """The share of each data set in what was read in each bin; None where that is not known."""
    totals = {}
    for key in curves.of:
        if key.startswith(_DATA_SET):
            ends = {bin.number: bin.high for bin in curves.of[key] if bin.count}
            first = 0.0 if curves.width == 1 else min(bin.low for bin in curves.of[key])
            totals[key.removeprefix(_DATA_SET)] = _growth(ends, first, len(curves.steps))
    return _shares(totals)


def _growth(ends: dict[int, float], last: float, bins: int) -> list[float]:
    growth = []
    for number in range(bins):
        end = ends.get(number, last)
        growth.append(max(end - last, 0.0))
        last = end
    return growth


def _shares(totals: dict[str, list[float]]) -> Stack:
    wholes = [sum(values) for values in zip(*totals.values(), strict=True)]
    return {
        name: [value / whole if whole else None for value, whole in zip(values, wholes, strict=True)]
        for name, values in totals.items()
        if any(values)
    }


def dumped(stack: Stack) -> dict[str, dict[str, Any]]:
    """Each one as a curve from `low`, where the one before it ends, to `high`."""
    curves: dict[str, dict[str, Any]] = {}
    below: list[float] = [0.0] * max((len(values) for values in stack.values()), default=0)
    for name, values in stack.items():
        above = [base + (value or 0.0) for base, value in zip(below, values, strict=True)]
        curves[name] = {
            "mean": [None if value is None else round(value, 5) for value in values],
            "low": [round(value, 5) for value in below],
            "high": [round(value, 5) for value in above],
        }
        below = above
    return curves
