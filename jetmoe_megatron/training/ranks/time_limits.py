"""A rank waits long for another while one rank alone may build or read for long, and shortly in training.

docs/reliability.md lists what is waited for.
"""

from __future__ import annotations

from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.runtime.time_limits import set_time_limit


def shorten_time_limits(run: Run) -> None:
    """After the first step."""
    set_time_limit(run.parallel.timeout_minutes)


def lengthen_time_limits(run: Run) -> None:
    """Before a rollback, which reads a checkpoint and may build indices."""
    set_time_limit(run.parallel.start_timeout_minutes)
