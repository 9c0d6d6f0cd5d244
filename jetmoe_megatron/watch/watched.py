"""What is known of a run under way, from the files of its folder."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from data_tools.locks import is_locked
from data_tools.progress import OnProgress, no_progress
from jetmoe_megatron.checkpoint.folder import newest
from jetmoe_megatron.config.load import load_sections
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.launch.starts import events
from jetmoe_megatron.launch.status import Plan, last_known, last_warnings
from jetmoe_megatron.monitor.jsonl import last_records
from jetmoe_megatron.report.lines import Line, is_usable
from jetmoe_megatron.report.table import Summary
from jetmoe_megatron.watch.tail import Tail, TakenBack

RECENT = 1000  # lines
_ALARMS = 5


class Watched:
    """
    Attributes:
        summary: of all lines of metrics.jsonl.
        recent: the last lines.
        alarms: the last ones, in words.
        routers: the last line of routers.jsonl.
        plan: None before the run has begun.
        history: the lines of starts.jsonl.
    """

    def __init__(self, folder: Path) -> None:
        """Raises UserError if it is not a run folder, nor an empty one."""
        self.files = RunFolder(folder)
        self._begin()
        files = self.files
        signs = (files.config, files.lock, files.starts, files.launches, files.logs, files.metrics)
        if not folder.is_dir() or (any(folder.iterdir()) and not any(sign.exists() for sign in signs)):
            raise UserError(f"{folder}: not a run folder: it has no config.yaml")

    def _begin(self) -> None:
        self._tail = Tail(self.files.metrics)
        self.summary = Summary()
        self.recent: deque[Line] = deque(maxlen=RECENT)
        self.alarms: deque[str] = deque(maxlen=_ALARMS)

    def look(self, progress: OnProgress = no_progress) -> None:
        """Read what is new.

        progress: gets the bytes of metrics.jsonl, read and in all.

        Raises:
            InputError, OSError: a file cannot be read.
        """
        try:
            self._read_lines(progress)
        except TakenBack:
            self._begin()
            self._read_lines(no_progress)  # from the beginning, where no line is taken back
        files = self.files
        self.plan = load_sections(files.config, Plan) if files.config.exists() else None
        self.history = list(events(files.starts))
        self.checkpoint = newest(files.checkpoints)
        self.routers = next((line for line in reversed(last_records(files.routers)) if is_usable(line)), None)
        self.bad_steps = last_records(files.bad_steps)[-1:]
        self.warnings = last_warnings(files, self.history)
        self.is_training = is_locked(files.lock)

    def _read_lines(self, progress: OnProgress) -> None:
        for line in self._tail.lines(progress):
            self.summary.add(line)
            self.recent.append(line)
            alarms = line.get("alarms")
            for name, message in alarms.items() if isinstance(alarms, dict) else ():
                self.alarms.append(f"step {line['step']:,}: {name}: {message}")

    @property
    def state(self) -> str:
        """In words. Locks do not reach every machine: without one, the files alone say what was last known."""
        if self.is_training:
            return "training" if self.recent else "starting: waits for the first step"
        if self.plan and self.plan.is_done(self.checkpoint):
            return self.plan.done
        if not (self.history or self.recent):
            return "waits for the run to begin"
        return last_known(self.history, asked=False)
