"""Stop requests from outside: SIGTERM, Ctrl-C, a lost terminal (SIGHUP), and SLURM's warning before the wall-time limit
(SIGUSR1)."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType, TracebackType

from jetmoe_megatron.stopping import FIRST_OF_SIGNALS, STOP_SIGNALS


class StopSignals:
    """While active, the first of these signals sets `received`; the loop finishes its step, saves and leaves. After an
    error too, it does not end the process.

    The same signal a second time ends the process at once, with status 128 + its number. A different signal does not:
    at the wall-time limit, SLURM's SIGTERM comes after its SIGUSR1, while the run is saving.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._first: dict[int, float] = {}  # when each came

    def __enter__(self) -> StopSignals:
        lasting = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()  # under nohup
        self._previous = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS.keys() - lasting}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind and issubclass(kind, Exception):
            return  # the launcher stops a rank that lost another, which has yet to name it
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        now = time.monotonic()
        if now - self._first.setdefault(number, now) > STOP_SIGNALS[signal.Signals(number)]:
            os._exit(FIRST_OF_SIGNALS + number)
