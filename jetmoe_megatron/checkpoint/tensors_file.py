"""One `.distcp` file: the pieces of tensors that a rank writes, one after the other, each as torch.save writes it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class WrittenPiece(NamedTuple):
    """A part of a tensor, and its place in a file of tensors."""

    name: str
    dtype: str  # "float32"
    whole: Sequence[int]  # shape of the whole tensor
    offset: Sequence[int]  # of this part in it
    shape: Sequence[int]
    start: int  # byte of the file
    length: int  # bytes


class TensorsFile:
    """A new `.distcp` file, checksummed while it is written. A context manager; at its end the file is on the disk.

    Attributes:
        pieces: what it holds.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.name = f"__{rank}_0.distcp"
        self.pieces: list[WrittenPiece] = []
        self._file = open(folder / self.name, "xb")
        self._refused: OSError | None = None
        self._digest, self._size = hashlib.sha256(), 0

    def add(self, name: str, whole: Sequence[int], offset: Sequence[int], tensor: Tensor) -> None:
        """
        Args:
            name: of the whole tensor.
            whole: its shape.
            offset: of this part in it.
            tensor: this part, on the CPU, contiguous, not a view of a larger one.

        Raises:
            OSError: the disk refuses.
        """
        start = self._size
        try:
            torch.save(tensor, self)  # type: ignore[arg-type]  # it calls `write` and `flush`
        except RuntimeError as error:  # torch hides the reason
            raise self._refused or error from None
        dtype = str(tensor.dtype).removeprefix("torch.")
        length = self._size - start
        self.pieces.append(WrittenPiece(name, dtype, [*whole], [*offset], [*tensor.shape], start, length))

    def write(self, content: memoryview) -> int:
        try:
            self._file.write(content)
        except OSError as error:
            self._refused = error
            raise
        self._digest.update(content)
        self._size += len(content)
        return len(content)

    def flush(self) -> None:
        self._file.flush()

    @property
    def checksum(self) -> tuple[int, str]:
        """(bytes, sha256)"""
        return self._size, self._digest.hexdigest()

    def __enter__(self) -> TensorsFile:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
