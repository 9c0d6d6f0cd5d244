"""All that a report says of one run, read once from its folder, line by line."""

from __future__ import annotations

import json
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jetmoe_megatron.checkpoint.folder import published, tokens_of
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.yaml_text import parse_yaml
from jetmoe_megatron.monitor.jsonl import each_record
from jetmoe_megatron.report.curves import MOST_BINS, Curves
from jetmoe_megatron.report.lines import Line, steps_of
from jetmoe_megatron.report.routers import Routers
from jetmoe_megatron.report.stack import PART
from jetmoe_megatron.report.table import Summary, spent_in

MARKS = ("checkpoint", "restart", "skipped step", "rollback", "alarm")
_MOST_MARKS = 300  # of a kind, the last ones
_MOST_PHASES = 100


@dataclass
class Marks:
    """Of one kind: where on the axis, and what to say there. `total` counts those too that are dropped."""

    kept: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=_MOST_MARKS))
    total: int = 0

    def add(self, tokens: int, text: str) -> None:
        self.kept.append((tokens, text))
        self.total += 1


@dataclass
class Stretch:
    """The lines of a phase. `read`: tokens of each data set that were read in them."""

    phase: str
    tokens: int  # before its first line
    read: dict[str, int] = field(default_factory=dict)


class History:
    """
    Attributes:
        config: the values of `config.yaml`; empty if it cannot be read, and `config_text` says why.
    """

    def __init__(self, folder: Path, share: int = 1) -> None:
        """share: runs that share a page: the more, the fewer numbers of each.

        Raises UserError or OSError if there are no metrics of a run, or a file cannot be read."""
        self.folder, self.files = folder, RunFolder(folder)
        self.curves = Curves(MOST_BINS // share)
        self.phases: list[Stretch] = []
        self.marks = {kind: Marks() for kind in MARKS}
        self.alarms: list[Line] = []
        self.slowest = Counter[int]()  # in how many steps each rank was the slowest
        self.summary = Summary.of(folder, self._each_line())
        self.routers = Routers.read(self.files.routers, share)
        self.bad_steps = list(each_record(self.files.bad_steps))
        self._add_marks()
        self.config_text, self.config = _config(self.files.config)
        self.name = str(self.config.get("name") or self.folder.resolve().name)

    def _each_line(self) -> Iterator[Line]:
        before: Line = {"tokens": 0}
        for line in steps_of(self.files.metrics):
            self.curves.add_line(line)
            if not self.phases and line["step"] > 1:  # it continues another run: what that has read does not count
                before = {key: value for key, value in line.items() if key != "step"}
            if type(rank := line.get("slowest_rank")) is int:
                self.slowest[rank] += 1
            for part, seconds in spent_in(line):
                self.curves.add(f"{PART}{part}", seconds, seconds, seconds)
            if "skipped" in line:
                self.marks["skipped step"].add(line["tokens"], f"step {line['step']:,}: skipped: {line['skipped']}")
            for name, message in _alarms(line):
                self.alarms.append({"step": line["step"], "alarm": name, "message": message})
                self.marks["alarm"].add(line["tokens"], f"step {line['step']:,}: {name}: {message}")
            if "start_seconds" in line and "step" in before:
                self.marks["restart"].add(line["tokens"], f"step {line['step']:,}: first after a start or a rollback")
            phase = str(line.get("phase", ""))
            if not self.phases or (self.phases[-1].phase != phase and len(self.phases) < _MOST_PHASES):
                self._end_phase(before)
                self.phases.append(Stretch(phase, before["tokens"], _read(before)))
            before = line
            yield line
        self._end_phase(before)

    def _end_phase(self, last: Line) -> None:
        if self.phases:
            began = self.phases[-1].read
            self.phases[-1].read = {name: tokens - began.get(name, 0) for name, tokens in _read(last).items()}

    def _add_marks(self) -> None:
        for path in published(self.files.checkpoints):
            self.marks["checkpoint"].add(tokens_of(path), f"checkpoint {path.name}")
        for tokens in _rolled_back_to(self.files.rollbacks):
            self.marks["rollback"].add(tokens, f"rolled back to {tokens:,} tokens")
        for line in self.bad_steps:
            if line.get("action") == "rollback":
                what = f"step {line['step']:,}: {line.get('reason')}: rolled back"
                self.marks["rollback"].add(self.tokens_at(line["step"]), what)

    def tokens_at(self, step: int) -> int:
        """After a step: all steps of a run have as many tokens."""
        last = self.summary.last
        return step * last["tokens"] // max(last["step"], 1)


def _alarms(line: Line) -> Iterable[tuple[str, Any]]:
    alarms = line.get("alarms")
    return alarms.items() if isinstance(alarms, dict) else ()


def _read(line: Line) -> dict[str, int]:
    prefix = "dataset_tokens/"
    return {
        key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix) and type(value) is int
    }


def _rolled_back_to(path: Path) -> list[int]:
    """Tokens of the checkpoints that rollbacks led to, as `resume/rollback.py` writes them down."""
    try:
        notes = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return []
    return [int(tokens) for tokens in notes if re.fullmatch("[0-9]{1,18}", str(tokens))]


def _config(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"{path}: {error}", {}
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        return f"{path}:{error}\n\n{text}", {}
    return text, tree if isinstance(tree, dict) else {}
