"""No process outlives the one that started it, even when that is killed.

Those that a rank forks, to write checkpoints and read data, are killed; a rank whose launcher is gone saves and ends.
"""

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


def stop_with_launcher() -> None:
    """SIGTERM for this rank when torchrun, which has started it, dies. Started by hand it has no launcher."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
