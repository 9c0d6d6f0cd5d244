"""What SLURM's queue says about jobs."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence

_ANSWERS = 30.0  # seconds
_FORMAT = "%i|%T|%r|%N|%M|%l"


def can_ask() -> bool:
    return shutil.which("squeue") is not None


def queued(jobs: Sequence[str]) -> tuple[list[str], str]:
    """A line for each of the jobs that waits or runs, and why the queue did not answer; empty if it did.

    Names that are no number of SLURM's are left out.
    """
    numbers = ",".join(filter(str.isdecimal, jobs))
    if not numbers or not can_ask():
        return [], ""
    try:
        squeue = subprocess.run(
            ["squeue", "--noheader", f"--jobs={numbers}", f"--format={_FORMAT}"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ANSWERS,
        )
    except subprocess.TimeoutExpired:
        return [], f"squeue did not answer in {_ANSWERS:g} s"
    if "Invalid job id" in squeue.stderr:  # it has forgotten the only job that it was asked for
        return [], ""
    if squeue.returncode:
        return [], f"squeue: {' '.join(squeue.stderr.split()) or f'exit status {squeue.returncode}'}"
    lines = [line.split("|") for line in squeue.stdout.splitlines()]
    if odd := [line for line in lines if len(line) != len(_FORMAT.split("|"))]:
        return [], f"squeue: not understood: {'|'.join(odd[0])}"
    return [_told(*line) for line in lines], ""


def _told(job: str, state: str, reason: str, nodes: str, since: str, limit: str) -> str:
    if state == "RUNNING":
        return f"job {job} runs on {nodes} for {since} of {limit}"
    return f"job {job}: {state} ({reason})"
