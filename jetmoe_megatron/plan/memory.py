"""A ledger of the bytes that tensors hold, from when each storage is made until nothing refers to it."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from torch import Tensor, UntypedStorage

ACTIVATIONS, COMMUNICATION = "activations", "communication buffers"


@dataclass
class _Held:
    storage: Any  # a weak reference: it calls back when the storage is freed
    bytes: int
    kind: str


class Ledger:
    """
    Attributes:
        held: bytes by kind, now.
        peak: the same when their sum was largest.
    """

    def __init__(self, block: int) -> None:
        """block: the allocator's: sizes are rounded up to a multiple of it, in bytes."""
        self._block = block
        self._storages: dict[int, _Held] = {}
        self.held: Counter[str] = Counter()
        self.total = 0
        self.peak: dict[str, int] = {}
        self.peak_total = 0

    def hold(self, tensor: Tensor, kind: str) -> None:
        """A tensor exists. Nothing happens if its storage is known."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            reference = weakref.ref(storage, lambda _: self._free(key))
            self._storages[key] = _Held(reference, 0, kind)
            self._resize(self._storages[key], storage.nbytes())

    def name(self, tensor: Tensor, kind: str, only: str | None = None) -> None:
        """Its storage is of another kind than it was thought to be. only: if it was thought to be of that kind."""
        held = self._storages.get(tensor.untyped_storage()._cdata)
        if held and (only is None or held.kind == only):
            self.held[held.kind] -= held.bytes
            self.held[kind] += held.bytes
            held.kind = kind

    @contextlib.contextmanager
    def resizes(self) -> Iterator[None]:
        """Within it, storages that the program empties or fills again are followed: no operation does that."""
        resize_ = UntypedStorage.resize_

        def followed(storage: UntypedStorage, size: int) -> Any:
            result = resize_(storage, size)
            if held := self._storages.get(storage._cdata):
                self._resize(held, storage.nbytes())
            return result

        with patch.object(UntypedStorage, "resize_", followed):
            yield

    def restart_peak(self) -> None:
        """The peak is from now on."""
        self.peak_total, self.peak = self.total, dict(self.held)

    def _free(self, key: int) -> None:
        self._resize(self._storages.pop(key), 0)

    def _resize(self, held: _Held, size: int) -> None:
        size = -(-size // self._block) * self._block
        self.held[held.kind] += size - held.bytes
        self.total += size - held.bytes
        held.bytes = size
        if self.total > self.peak_total:
            self.peak_total, self.peak = self.total, dict(self.held)
