"""What the writing process tells the rank that forked it.

Megatron keeps a queue in a process of its own for this (strategies/filesystem_async.py:51): one for every rank, 275 MB
each, that imports everything anew at the first save and stays for good when the run is killed.
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

    def __del__(self) -> None:
        self._file.close()

    def put(self, item: Any) -> None:
        pickle.dump(item, self._file)

    def get_nowait(self) -> Any:
        self._file.seek(0)
        data = self._file.readall()
        if not data:
            raise queue.Empty
        return pickle.loads(data)


def renew() -> None:
    """One for the next save of this process: what a save that failed has left in the last one is not its."""
    filesystem_async._results_queue = _Handover()
