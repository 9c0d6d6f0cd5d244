"""Whether a job starts again by itself after its ranks have ended, and on which nodes not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jetmoe_megatron.launch.starts import Start
from jetmoe_megatron.stopping import FIRST_OF_SIGNALS, ExitStatus, known_status


@dataclass(frozen=True)
class Decision:
    again: bool
    reason: str  # a line for the user
    leave_out: list[str] = field(default_factory=list)  # nodes that failed, where others did not


def decide(
    status: int,
    cancelled: bool,
    tokens: int,
    starts: Sequence[Start],
    failed: dict[str, str],
    most: int,
    requeued: bool = False,
) -> Decision:
    """What follows the end of a start.

    Args:
        status: exit status of the ranks.
        cancelled: whether somebody cancelled the job.
        tokens: of the newest checkpoint now.
        starts: of this job, this one last.
        failed: the nodes that failed, each with its reason.
        most: starts in a row that save no new checkpoint, after which the job stops.
        requeued: whether SLURM itself has queued the job again.
    """
    happened = "; ".join([_what_happened(status), *(f"{node}: {reason}" for node, reason in sorted(failed.items()))])
    if status == ExitStatus.DONE and not requeued:
        return Decision(False, happened)
    if cancelled:
        return Decision(False, f"{happened}; the job was cancelled: submit it again to continue")
    # If all failed, the nodes are not to blame; one alone may be.
    leave_out = sorted(failed) if len(failed) < max(len(starts[-1].nodes), 2) else []
    if requeued:
        return Decision(True, f"{happened}; SLURM itself has queued it again, as after a preemption", leave_out)
    known = known_status(status)
    if known is not None and not known.comes_back:
        return Decision(False, f"{happened}: {known.advice}")
    if tokens > starts[-1].tokens:
        return Decision(True, f"{happened}; it starts again, from {tokens:,} tokens", leave_out)
    idle = next((n for n, start in enumerate(reversed(starts)) if start.tokens != tokens), len(starts))
    if idle >= most:
        return Decision(False, f"{happened}; {idle} starts saved no new checkpoint: mend it, and submit it again")
    return Decision(True, f"{happened}; it starts again: {idle} of {most} starts without a new checkpoint", leave_out)


def _what_happened(status: int) -> str:
    if (known := known_status(status)) is not None:
        return f"{known.meaning} (status {status})"
    if status > FIRST_OF_SIGNALS:
        return f"signal {status - FIRST_OF_SIGNALS} ended a rank (status {status})"
    return f"a rank failed (status {status})"
