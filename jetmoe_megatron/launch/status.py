"""How a run is doing, read from its folder and, where it is, from SLURM's queue."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_tools.units import duration
from jetmoe_megatron.checkpoint.folder import newest, tokens_of
from jetmoe_megatron.config.load import load_sections
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Batch, Debug, Phase
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.launch.queued import can_ask, queued
from jetmoe_megatron.launch.starts import events, job_of
from jetmoe_megatron.monitor.jsonl import last_records
from jetmoe_megatron.monitor.table import two_columns

_RATE_OF = 100  # steps
_WARNINGS = 5  # lines, the last ones
_LOG_BYTES = 2**18  # of each log, at its end


class Plan(BaseModel):
    """What a status needs of `config.yaml`."""

    name: str
    batch: Batch
    phases: list[Phase]
    debug: Debug = Debug()

    @property
    def steps(self) -> int:
        return sum(-(-phase.tokens // self.batch.global_tokens) for phase in self.phases)

    @property
    def last_step(self) -> int:
        return min(self.steps, self.debug.max_steps or self.steps)

    def is_done(self, checkpoint: Path | None) -> bool:
        """checkpoint: the newest one."""
        return checkpoint is not None and tokens_of(checkpoint) >= self.last_step * self.batch.global_tokens

    @property
    def done(self) -> str:
        """What it is after its last step."""
        return "done" if self.last_step == self.steps else f"done, up to debug.max_steps ({self.last_step:,})"


def status(folder: Path) -> str:
    """A table of two columns.

    Raises:
        UserError: it is not a run folder.
    """
    files = RunFolder(folder)
    history = list(events(files.starts))
    if not files.config.exists():
        if history:
            return two_columns([*_state(history), *starts(history)])
        raise UserError(f"{folder}: no config.yaml; is it a run folder, and has the run begun?")
    plan = load_sections(files.config, Plan)
    records = last_records(files.metrics)
    checkpoint = newest(files.checkpoints)
    rows = [("run", plan.name), *([("state", plan.done)] if plan.is_done(checkpoint) else _state(history))]
    if records:
        try:
            rows += _progress(plan, records)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"{files.metrics}: not the metrics of a run ({type(error).__name__}: {error})") from None
        rows.append(("last step", f"{age(files.metrics)} ago"))
    if checkpoint:
        rows.append(("checkpoint", f"{checkpoint}, {age(checkpoint)} ago"))
    rows += starts(history)
    rows += [("warning" if number == 0 else "", line) for number, line in enumerate(last_warnings(files, history))]
    return two_columns(rows)


def _state(history: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Of a run that is not done."""
    waiting, problem = queued(list(dict.fromkeys(map(job_of, history))))
    yield "state", "; ".join(waiting) or last_known(history, asked=can_ask() and not problem)
    if problem:
        yield "queue", problem


def last_known(history: list[dict[str, Any]], asked: bool) -> str:
    """What starts.jsonl says. asked: whether SLURM has said that no job waits or runs."""
    if not history:
        return "no job of its own is known: see how long ago the last step was"
    begun = [event for event in history if event["event"] != "submitted"]
    if (last := history[-1])["event"] == "submitted" and job_of(last) not in map(job_of, begun):
        never = "never began, and is not in the queue" if asked else "and had not begun"
        return f"job {job_of(last)} was submitted at {last['time']}, {never}"
    last = begun[-1]
    if last["event"] == "end":
        return f"{'starts again' if last.get('again') else 'stopped'}: {last.get('reason', '')}"
    return f"start {last['start']} has not ended: see how long ago the last step was"


def _progress(plan: Plan, records: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    last, recent = records[-1], records[-_RATE_OF:]
    tokens, step = int(last["tokens"]), int(last["step"])
    yield "step", f"{step:,} of {plan.steps:,}, {tokens:,} tokens, phase {last['phase']}"
    yield "loss", f"{last['lm_loss']:.4f}"
    rate = statistics.median(record["tokens_per_second"] for record in recent)
    yield "tokens/s", f"{rate:,.0f} (median of {len(recent)} steps)"
    yield "time left", f"{duration(seconds_left(plan, recent))}, without restarts"


def seconds_left(plan: Plan, recent: Sequence[dict[str, Any]]) -> float:
    """At the pace of some lines of metrics.jsonl, with saves and evaluation where they are known."""
    seconds = sum(record.get("wall_seconds", record["step_seconds"]) for record in recent) / len(recent)
    return seconds * max(plan.last_step - recent[-1]["step"], 0)


def starts(history: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    ends = [event for event in history if event["event"] == "end"]
    begun = sum(event["event"] == "start" for event in history)
    if begun:
        yield "starts", f"{begun}, the last one at {next(e['time'] for e in history[::-1] if e['event'] == 'start')}"
    for number, end in enumerate(ends[-3:]):
        yield "ended" if number == 0 else "", f"{end['time']} {end.get('reason', '')}"


def last_warnings(files: RunFolder, history: list[dict[str, Any]]) -> list[str]:
    """The last lines of warnings and errors in the logs of the last start."""
    starts = [event["start"] for event in history if event["event"] == "start"]
    if not starts or "/" in starts[-1]:
        return []
    found: dict[str, None] = {}  # a set that keeps the order: many ranks say the same
    for log in sorted((files.logs / starts[-1]).glob("rank_*.log")):
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        found |= dict.fromkeys(line for line in lines if "warning: " in line.lower() or "error: " in line.lower())
    return [line if len(line) <= 200 else line[:197] + "..." for line in list(found)[-_WARNINGS:]]


def age(path: Path) -> str:
    """How long ago it was written."""
    return duration(max(0.0, time.time() - path.stat().st_mtime))
