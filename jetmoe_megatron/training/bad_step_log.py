"""The record of bad steps in the run folder: which numbers, which data, and what was done."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from data_tools.errors import InputError
from data_tools.progress import above
from jetmoe_megatron.data.mixture import Position
from jetmoe_megatron.monitor.jsonl import read_metrics, write_records
from jetmoe_megatron.training.loss_guard import Guard
from jetmoe_megatron.training.metrics import StepMetrics

_DONE = {"skip": "step skipped", "rollback": "rolling back"}


def record_bad_step(
    path: Path, step: int, reason: str, guard: Guard, metrics: StepMetrics, before: Position, after: Position
) -> None:
    """Add a line to the file `path`, and print one on stderr. A full disk does not stop the run.

    before, after: what was read before and after the step.
    """
    if torch.distributed.get_rank() != 0:
        return
    record = {
        "step": step,
        "reason": reason,
        "action": guard.action,
        **metrics.dump(),
        "samples": [before.sample, after.sample],  # from, up to and not including
        "sequences": {name: [before.sequences.get(name, 0), end] for name, end in after.sequences.items()},
    }
    above(_line(step, reason, guard), sys.stderr)
    try:
        write_records(path, [*read_metrics(path), record])
    except (InputError, OSError) as error:
        above(f"warning: cannot write {path}: {error}", sys.stderr)


def _line(step: int, reason: str, guard: Guard) -> str:
    what = f"step {step}: {reason}"
    if guard.is_exhausted:
        among = f"{len(guard.bad)} bad steps within {guard.options.window}"
        return f"error: {what}: {among} are more than guard.budget ({guard.options.budget}): stopped, nothing saved"
    if guard.action == "stop":
        return f"error: {what}: stopped, nothing saved; guard.on_bad_step=skip or rollback would continue"
    return f"warning: {what}: {_DONE[guard.action]}"
