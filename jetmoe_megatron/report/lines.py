"""The lines of a run's files that a report can use. Others, such as those that a kill cut off, are left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jetmoe_megatron.config.schema import MOST
from jetmoe_megatron.monitor.jsonl import each_record

Line = dict[str, Any]


def steps_of(path: Path) -> Iterator[Line]:
    """One line at a time, of steps in ascending order, with `step` and `tokens`.

    Raises InputError if the file cannot be read.
    """
    last = -1
    for line in each_record(path):
        if is_usable(line) and line["step"] > last:
            last = line["step"]
            yield line


def number(line: Line, key: str) -> float | None:
    """The value as a float, if it is a number."""
    value = line.get(key)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def is_usable(line: Line) -> bool:
    """Whether it has tokens, and no whole number is beyond what a run can have: some would fit no float."""
    return (
        isinstance(line.get("tokens"), int)
        and line["step"] >= 0
        and all(abs(value) <= MOST for value in line.values() if type(value) is int)
    )
