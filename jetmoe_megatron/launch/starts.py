"""`starts.jsonl` of a run folder: a line for each job that was submitted, each start of a job and each end, with what
followed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jetmoe_megatron.runtime.clock import utc_now

# What a line has at least, besides these.
_KEYS = {"submitted": {"job"}, "start": {"start", "tokens", "nodes"}, "end": {"start", "tokens"}}
_ALWAYS = {"event", "time"}


@dataclass(frozen=True)
class Start:
    start: str  # JOB-NUMBER
    time: str  # UTC
    tokens: int  # of the newest checkpoint when it began; 0: there was none
    nodes: list[str]

    @property
    def job(self) -> str:
        return self.start.rpartition("-")[0]


def add_submitted(file: Path, job: str) -> None:
    """A job that waits in a queue. It may have begun: then this line comes after that of its start."""
    _add(file, {"event": "submitted", "job": job, "time": utc_now()})


def add_start(file: Path, start: Start) -> None:
    _add(file, {"event": "start", **asdict(start)})


def add_end(file: Path, start: str, **values: Any) -> None:
    _add(file, {"event": "end", "start": start, **values})


def job_of(event: dict[str, Any]) -> str:
    """Of any line."""
    return str(event["job"]) if event["event"] == "submitted" else str(event["start"]).rpartition("-")[0]


def starts_of(file: Path, job: str) -> list[Start]:
    """In the order of time."""
    found = (event for event in events(file) if event["event"] == "start")
    starts = [Start(event["start"], event["time"], event["tokens"], event["nodes"]) for event in found]
    return [start for start in starts if start.job == job]


def events(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of the file, if it exists. Those that a crash cut off are left out."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(event, dict) or not isinstance(event.get("start", ""), str):
            continue
        if event.keys() >= _ALWAYS | _KEYS.get(str(event.get("event")), {"known"}):
            yield event


def _add(file: Path, event: dict[str, Any]) -> None:
    with file.open("a+b") as lines:
        if lines.tell():
            lines.seek(-1, 2)
            if lines.read(1) != b"\n":  # cut off by a crash
                lines.write(b"\n")
        lines.write(json.dumps(event).encode() + b"\n")
