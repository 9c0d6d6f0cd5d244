"""Which steps of a run are still to do."""

from __future__ import annotations

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import SharedError
from jetmoe_megatron.resume.start_point import StartPoint


def steps_left(run: Run, layout: Layout, start: StartPoint) -> tuple[int, int]:
    """The number of steps that are done, and the number of them after which this start ends.

    Raises:
        SharedError: more steps are done than the phases have.
    """
    done, last = start.progress["tokens"] // run.batch.global_tokens, layout.steps
    if done > last:
        raise SharedError(
            f"{start.checkpoint}: is after the last of the {last} steps of all phases: to decay from it, begin "
            "another run there with start_from and phase"
        )
    return done, min(last, run.debug.max_steps or last)


def nothing_left(run: Run, layout: Layout, last: int) -> str:
    """One line. last: as above."""
    what = f"debug.max_steps: {last} of {layout.steps}" if last < layout.steps else f"all {last}"
    return f"{RunFolder.of(run).root}: {what} steps are done, nothing left to do"
