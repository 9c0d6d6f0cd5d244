"""Passes each step's record to the trackers. A tracker that fails is dropped; it never stops a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Protocol

Record = dict[str, float | int | str]


class Tracker(Protocol):
    def write(self, record: Record) -> None:
        """Take the record of one step; `step` counts from 1."""

    def amend(self, step: int, values: Record) -> None:
        """Take more values of the last step that the previous process wrote."""

    def close(self) -> None: ...


class Monitor:
    """A no-op on ranks that have no trackers."""

    def __init__(self, builders: list[Callable[[], Tracker]]) -> None:
        """A tracker that cannot be built, for example without a network, is left out with a warning."""
        self.trackers: list[Tracker] = []
        for build in builders:
            try:
                self.trackers.append(build())
            except Exception as error:
                _warn(getattr(build, "func", build), error)

    def log(self, record: Record) -> None:
        self._each(lambda tracker: tracker.write(record))

    def amend(self, step: int, values: Record) -> None:
        self._each(lambda tracker: tracker.amend(step, values))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self.trackers):
            try:
                call(tracker)
            except Exception as error:
                self.trackers.remove(tracker)
                _warn(type(tracker), error)


def _warn(tracker: Any, error: Exception) -> None:
    reason = str(error).split("\n")[0]
    print(f"warning: {tracker.__name__} failed and is switched off for this run: {reason}", file=sys.stderr, flush=True)
