"""The index cache of a run, which a dry run reads and does not change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from jetmoe_megatron.data.index_cache import Build, IndexCache


class BorrowedCache(IndexCache):
    """
    Attributes:
        missing: the number of keys that the cache did not have. They were built into another folder.
    """

    def __init__(self, root: Path, scratch: Path, report: Callable[[str], None]) -> None:
        """scratch: where missing keys are built."""
        super().__init__(root)
        self._scratch = IndexCache(scratch, report, from_seconds=1)
        self.missing = 0

    def __contains__(self, key: str) -> bool:
        return super().__contains__(key) or key in self._scratch

    def add(self, key: str, build: Build) -> None:
        if key not in self:
            self._scratch.add(key, build)
            self.missing += 1

    def read(self, key: str, name: str, *shape: int) -> np.ndarray:
        return self._scratch.read(key, name, *shape) if key in self._scratch else super().read(key, name, *shape)
