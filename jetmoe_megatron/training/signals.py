"""Stop requests from outside: SIGTERM, Ctrl-C, and SLURM's warning before the wall-time limit (SIGUSR1)."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_ONE_REQUEST = 2.0  # seconds within which repeats are the same Ctrl-C


class StopSignals:
    """While active, the first of these signals sets `received`; the loop finishes its step, saves and leaves.

    A second Ctrl-C ends the process at once. Other repeats mean nothing: SLURM and torchrun both pass a signal on, so
    that a process gets one request several times.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0

    def __enter__(self) -> StopSignals:
        self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._received_at > _ONE_REQUEST:
            os._exit(128 + number)
