"""Processes that a rank forks, to write checkpoints and to read data, do not outlive it, even when it is killed."""

from __future__ import annotations

import ctypes
import functools
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@functools.cache
def end_with_this_process() -> None:
    """From now on, whatever this process forks, and whatever that forks in turn."""
    set_option = ctypes.CDLL(None).prctl  # looked up here: little is allowed in a process that was just forked
    os.register_at_fork(after_in_child=lambda: set_option(_PR_SET_PDEATHSIG, signal.SIGKILL))
