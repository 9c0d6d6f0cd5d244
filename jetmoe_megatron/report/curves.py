"""Curves of a run, thinned while they are read: a bin of several lines keeps the mean, the least and the most.

A file may have hundreds of thousands of lines, and nobody knows how many before its end. So each line is a bin at
first. When there are too many bins, each pair becomes one, and from then on a bin takes twice as many lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Any

from jetmoe_megatron.report.lines import Line

MOST_BINS = 1600
_MOST_KEYS = 400  # of curves


@dataclass(slots=True)
class Bin:
    number: int
    low: float = inf
    high: float = -inf
    total: float = 0.0
    count: int = 0  # of finite values
    broken: int = 0  # of other values

    def take(self, low: float, mean: float, high: float) -> None:
        if isfinite(low) and isfinite(high) and isfinite(mean):
            self.low = low if low < self.low else self.low
            self.high = high if high > self.high else self.high
            self.total += mean
            self.count += 1
        else:
            self.broken += 1

    def join(self, other: Bin) -> None:
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.total += other.total
        self.count += other.count
        self.broken += other.broken

    @property
    def mean(self) -> float | None:
        """None if the bin has no finite value."""
        return self.total / self.count if self.count else None


class Curves:
    """The curves of one file over the same bins."""

    def __init__(self, most_bins: int = MOST_BINS) -> None:
        self.width = 1  # lines of a bin
        self.steps: list[int] = []  # at the end of each bin
        self.tokens: list[int] = []
        self.of: dict[str, list[Bin]] = {}  # only bins in which the key was
        self.begin = (0, 0)  # steps and tokens before the first line
        self._most, self._lines, self._now = most_bins, 0, 0

    def next_line(self, step: int, tokens: int) -> None:
        """What is added from now on belongs to this line."""
        if not self._lines:
            self.begin = (step - 1, tokens - tokens // max(step, 1))  # all steps have as many tokens
        if self._lines == self._most * self.width:
            self._halve()
        self._now = self._lines // self.width
        self._lines += 1
        if self._now == len(self.steps):
            self.steps.append(step)
            self.tokens.append(tokens)
        self.steps[-1], self.tokens[-1] = step, tokens

    def add(self, key: str, low: float, mean: float, high: float) -> None:
        bins = self.of.get(key)
        if bins is None:
            if len(self.of) == _MOST_KEYS:
                return
            bins = self.of[key] = []
        if not bins or bins[-1].number != self._now:
            bins.append(Bin(self._now))
        bins[-1].take(low, mean, high)

    def add_line(self, line: Line) -> None:
        """All its numbers."""
        self.next_line(line["step"], line["tokens"])
        for key, value in line.items():
            if type(value) is float or type(value) is int:
                self.add(key, value, value, value)

    def dump(self, key: str) -> dict[str, Any]:
        """For the page, in JSON's numbers. `at`: the bins that have a value, if not all have. `low` and `high` are left
        out where a bin is one value. `gaps`: which values stand before a gap, because some numbers were not finite."""
        bins = self.of[key]
        curve: dict[str, Any] = {"mean": [self.rounded(bin.mean) for bin in bins]}
        if len(bins) < len(self.steps):
            curve["at"] = [bin.number for bin in bins]
        if any(bin.low < bin.high for bin in bins):
            curve["low"] = [self.rounded(bin.low) for bin in bins]
            curve["high"] = [self.rounded(bin.high) for bin in bins]
        if gaps := [i for i, bin in enumerate(bins) if bin.broken]:
            curve["gaps"] = gaps
        return curve

    def rounded(self, value: float | None) -> float | None:
        """Values of single lines stay exact. JSON has no infinity."""
        if value is None or not isfinite(value):
            return None
        return value if self.width == 1 else float(f"{value:.6g}")

    def _halve(self) -> None:
        self.width *= 2
        self.steps, self.tokens = self.steps[1::2], self.tokens[1::2]  # there is an even number of full bins
        for key, bins in self.of.items():
            joined: list[Bin] = []
            for bin in bins:
                bin.number //= 2
                if joined and joined[-1].number == bin.number:
                    joined[-1].join(bin)
                else:
                    joined.append(bin)
            self.of[key] = joined
