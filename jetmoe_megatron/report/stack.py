"""Shares of a whole over time, as bars: what the time went into, and which data sets were read."""

from __future__ import annotations

from typing import Any

from jetmoe_megatron.report.curves import Curves

PART = "part/"  # keys of the parts of a line's time, as `table.spent_in` names them
_DATA_SET = "dataset_tokens/"
_MOST_BARS = 120


def time_by_part(curves: Curves) -> dict[str, Any]:
    amounts = {}
    for key in curves.of:
        if key.startswith(PART):
            amounts[key.removeprefix(PART)] = {bin.number: max(bin.total, 0.0) for bin in curves.of[key]}
    return _stacked(amounts, len(curves.steps))


def data_sets(curves: Curves) -> dict[str, Any]:
    amounts = {}
    for key in curves.of:
        if key.startswith(_DATA_SET):
            amounts[key.removeprefix(_DATA_SET)] = own = dict[int, float]()
            last = curves.of[key][0].low if curves.begin[0] else 0.0  # a run that continues another: what that read
            for bin in curves.of[key]:
                own[bin.number] = max(bin.high - last, 0.0)
                last = max(bin.high, last)
    return _stacked(amounts, len(curves.steps))


def _stacked(amounts: dict[str, dict[int, float]], bins: int) -> dict[str, Any]:
    """As curves: `low` is where the one before it ends, `mean` its own share in each bar, `share` that in all bars.

    amounts: in each bin that has one, by name.
    """
    size = -(-bins // _MOST_BARS)  # bins of a bar
    bars = -(-bins // size) if size else 0
    summed = {name: [0.0] * bars for name in amounts}
    for name, of_bins in amounts.items():
        for number, amount in of_bins.items():
            summed[name][number // size] += amount
    wholes = [sum(values) for values in zip(*summed.values(), strict=True)]
    at = [min((bar + 1) * size, bins) - 1 for bar in range(bars)]
    stacked, below = {}, [0.0] * bars
    for name, values in summed.items():
        if not any(values):
            continue
        shares = [value / whole if whole else None for value, whole in zip(values, wholes, strict=True)]
        above = [base + (share or 0.0) for base, share in zip(below, shares, strict=True)]
        stacked[name] = {
            "at": at,
            "mean": [None if share is None else round(share, 5) for share in shares],
            "low": [round(value, 5) for value in below],
            "high": [round(value, 5) for value in above],
            "share": sum(values) / sum(wholes),
        }
        below = above
    return stacked
