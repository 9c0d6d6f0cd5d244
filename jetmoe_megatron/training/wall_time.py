"""Where the time of a run goes, from its first start on: every moment belongs to one part.

A line of metrics.jsonl has the parts of the time since the line before it, so that the parts of all lines add up to the
run's wall time. What a kill, the queue or a rollback took, with the steps that they lost, is in `start_seconds` of the
first line after it.

`rank_hours` is what the run has cost so far: the time that its processes have held their GPUs, on all ranks. It counts
lost steps, and no time in a queue. What a killed process held after its last line is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.runtime.clock import process_began, steady_time

# In the order of a line. `step_seconds` includes `data_wait_seconds`.
PARTS = ("save_stall_seconds", "other_seconds", "start_seconds", "step_seconds", "evaluation_seconds")
_TIME = "%Y-%m-%dT%H:%M:%S.%fZ"
_MOST = 2.0**40  # seconds


@dataclass
class WallTime:
    began: float  # seconds since 1970, as `line`
    line: float  # when the last line was written; without lines, when the run began
    useful: float = 0.0  # seconds of computing up to that line
    ranks: int = 1
    rank_hours: float = 0.0  # up to that line
    dollars_per_hour: float | None = None  # of a rank
    held_since: float = field(default_factory=process_began)  # what `rank_hours` does not have yet
    parts: dict[str, float] = field(default_factory=dict)  # since that line

    @classmethod
    def of(cls, lines: Iterable[dict[str, Any]], step: int, ranks: int = 1) -> WallTime:
        """For a run that continues after `step`. lines: of metrics.jsonl, also those of steps that are lost."""
        began: float | None = None
        line: float | None = None
        useful = rank_hours = held_since = 0.0
        for record in lines:
            rank_hours = max(rank_hours, _hours(record))
            if times := _times(record):
                began = times[0] if began is None else began  # lines of earlier versions have no times
                line, useful = times[1:] if record["step"] <= step else (line, useful)
                held_since = times[1]
        began = process_began() if began is None else began
        line = began if line is None else line
        ahead = max(line - steady_time(), 0.0)  # of this machine's clock: another one's may have written the line
        held_since = max(process_began(), min(held_since, steady_time()))  # after a rollback: since the line before it
        return cls(began - ahead, line - ahead, useful, ranks, rank_hours, held_since=held_since)

    def end(self, part: str) -> float:
        """Count the time since the part before ended, or since the line before, as `part`. Returns it."""
        seconds = max(steady_time() - self.line - sum(self.parts.values()), 0.0)
        self.parts[part] = self.parts.get(part, 0.0) + seconds
        return seconds

    def new_line(self, data_wait: float, useful: bool) -> Record:
        """The times of a line, which is written now.

        Args:
            data_wait: seconds of the step in which a rank waited for data.
            useful: the step changed the weights.
        """
        parts, self.parts = {name: self.parts[name] for name in PARTS if name in self.parts}, {}
        wall = sum(parts.values())
        self.line += wall
        self.useful += max(parts["step_seconds"] - data_wait, 0.0) if useful else 0.0
        run = self.line - self.began
        self.rank_hours += max(self.line - self.held_since, 0.0) * self.ranks / 3600
        self.held_since = self.line
        now = datetime.fromtimestamp(self.line, timezone.utc).strftime(_TIME)
        return {
            "time": now,
            **parts,
            "wall_seconds": wall,
            "run_seconds": run,
            "goodput": self.useful / run,
            "rank_hours": self.rank_hours,
            **({} if self.dollars_per_hour is None else {"dollars": self.dollars_per_hour * self.rank_hours}),
        }


def _hours(record: dict[str, Any]) -> float:
    hours = record.get("rank_hours", 0.0)
    return hours if isinstance(hours, float) and 0 <= hours < _MOST else 0.0


def _times(record: dict[str, Any]) -> tuple[float, float, float] | None:
    """When the run began, when this line was written, and the useful seconds until then; None if it does not say."""
    try:
        ended = datetime.strptime(record["time"], _TIME).replace(tzinfo=timezone.utc).timestamp()
        run, goodput = float(record["run_seconds"]), float(record["goodput"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return (ended - run, ended, run * goodput) if 0 <= run < _MOST and 0 <= goodput <= 1 else None
