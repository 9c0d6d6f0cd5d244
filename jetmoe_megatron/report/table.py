"""The numbers of a run in two columns (`jetmoe report`)."""

from __future__ import annotations

import math
import statistics
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_tools.units import duration
from jetmoe_megatron.checkpoint.checksums import newest_whole
from jetmoe_megatron.checkpoint.folder import newest
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.monitor.table import two_columns
from jetmoe_megatron.report.lines import Line, number, steps_of

Rows = list[tuple[str, str]]


def report(folder: Path) -> str:
    """Raises UserError if there are no metrics of a run."""
    return shown(Summary.of(folder, steps_of(RunFolder(folder).metrics)), folder)


def shown(summary: Summary, folder: Path) -> str:
    return two_columns([*summary.rows(), *results(folder)])


def results(folder: Path) -> Rows:
    """Where the results of a run are."""
    files = RunFolder(folder)
    checkpoint, exported = newest_whole(files.checkpoints), newest(files.exports)
    rows = [("checkpoint", str(checkpoint))] if checkpoint else []
    rows += [("Hugging Face", str(exported))] if exported else []
    return [*rows, ("metrics", str(files.metrics))]


class Summary:
    """Takes one line after the other."""

    def __init__(self) -> None:
        self.first: Line = {}
        self.last: Line = {}
        self.evaluated: Line = {}  # the last line with held-out losses
        self.skipped = 0
        self.spent = dict[str, float]()  # seconds
        self._rates = array("d")

    @classmethod
    def of(cls, folder: Path, lines: Iterable[Line]) -> Summary:
        """Of all lines. Raises UserError if there are none."""
        summary = cls()
        for line in lines:
            summary.add(line)
        if not summary.last:
            raise UserError(f"{RunFolder(folder).metrics}: no steps recorded; is {folder} a run folder?")
        return summary

    def add(self, line: Line) -> None:
        self.first, self.last = self.first or line, line
        if "held_out_loss" in line:
            self.evaluated = line
        if (rate := number(line, "tokens_per_second")) is not None:
            self._rates.append(rate)
        self.skipped += "skipped" in line
        for name, seconds in spent_in(line):
            self.spent[name] = self.spent.get(name, 0.0) + seconds

    def rows(self) -> Rows:
        first, last = self.first, self.last
        rows = [("steps", f"{last['step']:,}"), ("tokens", f"{last['tokens']:,}")]
        rows += [
            (f"  from {key.removeprefix('dataset_tokens/')}", f"{value:,}")
            for key, value in last.items()
            if key.startswith("dataset_tokens/") and isinstance(value, int)
        ]
        rows += [("skipped steps", f"{self.skipped:,}")] if self.skipped else []
        for name, line in (("first loss", first), ("last loss", last)):
            rows += _loss(name, line, "lm_loss")
        for key in self.evaluated:
            if key.startswith("held_out_loss"):
                name = key.replace("held_out_loss/", "  on ").replace("held_out_loss", "held-out loss")
                rows += _loss(name, self.evaluated, key)
        if self._rates:
            rows.append(("tokens/s", f"{statistics.median(self._rates):,.0f} (median)"))
        return rows + spent_rows(self)


def spent_rows(summary: Summary) -> Rows:
    """What the time went into. Empty for a run of an earlier version, which recorded no wall time."""
    wall, goodput = sum(summary.spent.values()), number(summary.last, "goodput")
    if not wall or goodput is None:
        return []
    rows = [("wall time", duration(wall)), ("goodput", f"{goodput:.2%}")]
    return rows + [(f"  {name}", f"{seconds / wall:.2%}") for name, seconds in summary.spent.items() if name != STEPS]


def _loss(name: str, line: Line, key: str) -> Rows:
    value = number(line, key)
    return [] if value is None else [(name, f"{value:.4f}")]


STEPS, SKIPPED, WAITS = "steps", "skipped steps", "waits for data"
PARTS = {
    "start_seconds": "starts",
    "save_stall_seconds": "saves",
    "evaluation_seconds": "evaluation",
    "other_seconds": "other",
}


def spent_in(line: Line) -> Iterator[tuple[str, float]]:
    """What the time of a line was spent on. Every line has the first two."""
    step, wait = _seconds(line, "step_seconds") or 0.0, _seconds(line, "data_wait_seconds") or 0.0
    yield (SKIPPED if "skipped" in line else STEPS), step - wait
    yield WAITS, wait
    for key, name in PARTS.items():
        if (seconds := _seconds(line, key)) is not None:
            yield name, seconds


def _seconds(line: Line, key: str) -> float | None:
    value = number(line, key)
    return value if value is not None and math.isfinite(value) else None
