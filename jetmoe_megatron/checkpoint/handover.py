"""How the writing process tells its result to the rank that forked it.

Megatron keeps a queue in a separate process for this (strategies/filesystem_async.py:51): one process for every rank,
275 MB each. It imports everything again at the first save, and stays forever when the run is killed.
"""

from __future__ import annotations

import os
import pickle
import queue
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


class _Handover:
    """A queue for one item, in memory that a forked process shares: there is no file that others could write."""

    def __init__(self) -> None:
        self._file = open(os.memfd_create("written"), "r+b", buffering=0)  # empty: it is never written twice

    def put(self, item: Any) -> None:
        pickle.dump(item, self._file)

    def get_nowait(self) -> Any:
        self._file.seek(0)
        data = self._file.readall()
        if not data:
            raise queue.Empty
        return pickle.loads(data)


def renew() -> None:
    """Make a new queue for the next save, so that it does not read what a failed save has left in the old one."""
    filesystem_async._results_queue = _Handover()
