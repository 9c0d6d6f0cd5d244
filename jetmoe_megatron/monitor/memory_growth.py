"""How fast the memory of ranks grows. A jump, as when the first checkpoint is saved, is no growth."""

from __future__ import annotations

import statistics
from collections import deque
from itertools import pairwise

from jetmoe_megatron.monitor.monitor import Record

MEMORY = ("host_memory_gb", "device_memory_gb")
WINDOW = 1000  # steps
_PARTS = 8


def slope_of(name: str) -> str:
    return f"{name}_per_1000_steps"


class MemoryGrowth:
    """Over the last `WINDOW` steps of this start."""

    def __init__(self) -> None:
        self._of_steps = {name: deque[float](maxlen=WINDOW) for name in MEMORY}

    def add(self, record: Record) -> Record:
        """The slopes, once enough steps are known: the median growth from one eighth of them to the next."""
        slopes = {}
        for name, of_steps in self._of_steps.items():
            if name not in record:
                continue
            of_steps.append(record[name])
            if len(of_steps) == WINDOW and record["step"] % (WINDOW // _PARTS) == 0:
                slopes[slope_of(name)] = _slope(list(of_steps))
        return slopes


def _slope(of_steps: list[float]) -> float:
    length = len(of_steps) // _PARTS
    medians = [statistics.median(of_steps[first : first + length]) for first in range(0, length * _PARTS, length)]
    return statistics.median(b - a for a, b in pairwise(medians)) * _PARTS
