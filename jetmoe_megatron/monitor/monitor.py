"""Passes each step's record to the trackers. A tracker that fails is tried again later; it never stops a run."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from data_tools.progress import above

Record = dict[str, Any]  # numbers and words; `alarms` is a dict of words, `routers` a line of routers.jsonl

_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 3600.0  # seconds before a tracker is tried again; doubled after each failure
_TIMES_AS_LONG = 100  # as the attempt took, so that trying takes at most 1% of the time
_MOST_WAITING = 10_000  # records that wait for one tracker; the oldest are dropped


class Tracker(Protocol):
    """What a call has raised an exception for, it has not taken: it comes again."""

    def write(self, record: Record) -> None:
        """Take the record of one step; `step` counts from 1."""

    def amend(self, step: int, values: Record) -> None:
        """Take more values of the last step that the previous process wrote."""

    def close(self) -> None: ...


class Monitor:
    """A no-op on ranks that have no trackers."""

    def __init__(self, builders: list[Callable[[], Tracker]]) -> None:
        """A tracker that cannot be built now, for example without a network, is built later."""
        self._trackers = [_Patient(build) for build in builders]

    def log(self, record: Record) -> None:
        for tracker in self._trackers:
            tracker.hand_over(lambda taker: taker.write(record))

    def amend(self, step: int, values: Record) -> None:
        for tracker in self._trackers:
            tracker.hand_over(lambda taker: taker.amend(step, values))

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.close()


class _Patient:
    """Builds a tracker and calls it. After a failure, calls wait and are made later, in their order."""

    def __init__(self, build: Callable[[], Tracker]) -> None:
        self._name = (build.func if isinstance(build, partial) else build).__name__
        self._build = build
        self._tracker: Tracker | None = None
        self._waiting: deque[Callable[[Tracker], None]] = deque(maxlen=_MOST_WAITING)
        self._pause, self._again_at = _FIRST_PAUSE, 0.0
        self._fails = False
        self._try()

    def hand_over(self, call: Callable[[Tracker], None]) -> None:
        self._waiting.append(call)
        if time.monotonic() >= self._again_at:
            self._try()

    def close(self) -> None:
        if self._waiting:
            self._try()
        try:
            if self._tracker is not None:
                self._tracker.close()
        except Exception as error:
            self._warn(f"failed at its end: {_first_line(error)}")
        if self._waiting:
            self._warn(f"did not take the last {len(self._waiting)} records")

    def _try(self) -> None:
        started = time.monotonic()
        try:
            self._tracker = self._tracker or self._build()
            while self._waiting:
                self._waiting[0](self._tracker)
                self._waiting.popleft()
        except Exception as error:
            now = time.monotonic()
            pause = max(self._pause, _TIMES_AS_LONG * (now - started))
            self._pause, self._again_at = min(2 * self._pause, _LONGEST_PAUSE), now + pause
            self._fails = True
            self._warn(f"failed and is tried again in {pause:.0f} seconds: {_first_line(error)}")
            return
        if self._fails:
            above(f"{self._name} works again: it has all records that waited", sys.stderr)
        self._pause, self._fails = _FIRST_PAUSE, False

    def _warn(self, what: str) -> None:
        above(f"warning: {self._name} {what}", sys.stderr)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]
