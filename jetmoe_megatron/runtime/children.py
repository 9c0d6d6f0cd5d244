"""No process outlives the process that started it, even if that is killed.

If a rank dies, the processes that it forked to read data are killed. If a launcher dies, its
ranks save and end.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@functools.cache
def end_with_this_process() -> None:
    """From now on, each process that this one forks dies with it, and each that those fork dies with its parent."""
    set_option = ctypes.CDLL(None).prctl  # looked up here: little is allowed in a process that was just forked
    os.register_at_fork(after_in_child=lambda: set_option(_PR_SET_PDEATHSIG, signal.SIGKILL))


def stop_with_launcher() -> None:
    """This rank gets SIGTERM when torchrun, which started it, dies. A rank that was started by hand has no launcher."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
