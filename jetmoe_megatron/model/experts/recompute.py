"""An activation that is freed after the forward pass and computed again in the backward pass.

Megatron-Core's CheckpointWithoutOutput does this too, but its newer versions compile C++ in the first backward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class _Place(NamedTuple):
    """Where in the activation a saved tensor lies: one of the parts that a backend splits it into, or all of it."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Recomputed:
    """`y = function(x)`, which the operations under `hooks` do not keep.

    The first of them that runs backward computes `function(x)` again, and the last of them frees it.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
        self._function, self._x = function, x.detach()
        self._storage = _identity(y)
        self._kept = self._used = 0
        self._again: Tensor | None = None

    def hooks(self) -> contextlib.AbstractContextManager[None]:
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, saved: Tensor) -> Tensor | _Place:
        if _identity(saved) != self._storage:
            return saved
        self._kept += 1
        return _Place(saved.shape, saved.stride(), int(saved.storage_offset()))

    def _unpack(self, packed: Tensor | _Place) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if self._again is None:
            self._again = self._function(self._x)
        y = self._again.as_strided(*packed)
        self._used += 1
        if self._used == self._kept:
            self._again, self._used = None, 0
        return y


def _identity(x: Tensor) -> int:
    """The same for all tensors that share their numbers, while one of them lives; its address is 0 without numbers."""
    return x.untyped_storage()._cdata
