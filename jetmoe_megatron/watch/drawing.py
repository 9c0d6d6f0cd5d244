"""Numbers as characters: a curve of dots, and the load of experts as a strip. Both can be read without colour."""

from __future__ import annotations

import math
from collections.abc import Sequence

_DOTS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))  # of a braille character: left and right, from below
_BLANK = 0x2800
_LEVELS = "▁▂▃▄▅▆▇█"  # loads from 1/4 to 4 on a logarithmic scale
DEAD, NO_NUMBER = "x", "?"
_COLOURS = ("blue", "blue", "cyan", "green", "green", "yellow", "red", "red")


def curve(values: Sequence[float], columns: int, rows: int) -> list[str]:
    """Lines of characters, from the top. A character has two bins beside each other, drawn from the least to the most.

    Values that are not finite leave gaps.
    """
    bins = min(len(values), 2 * columns)
    parts = [values[len(values) * i // bins : len(values) * (i + 1) // bins] for i in range(bins)]
    finite = [[value for value in part if math.isfinite(value)] for part in parts]
    every = [value for part in finite for value in part]
    if not every:
        return [" " * columns] * rows
    low, high, most = min(every), max(every), 4 * rows - 1
    cells = [[_BLANK] * columns for _ in range(rows)]

    def level(value: float) -> int:
        return round((value - low) / (high - low) * most) if high > low else most // 2

    for number, part in enumerate(finite):
        for dot in range(level(min(part)), level(max(part)) + 1) if part else ():
            cells[rows - 1 - dot // 4][number // 2] |= _DOTS[number % 2][dot % 4]
    return ["".join(map(chr, row)) for row in cells]


def cell(load: float) -> tuple[str, str]:
    """A character and its colour. load: an expert's share of the assignments, times the number of experts."""
    if math.isnan(load):
        return NO_NUMBER, "magenta"
    if load <= 0:
        return DEAD, "bold red"
    level = round((min(max(math.log2(load), -2.0), 2.0) + 2) / 4 * 7)
    return _LEVELS[level], _COLOURS[level]
