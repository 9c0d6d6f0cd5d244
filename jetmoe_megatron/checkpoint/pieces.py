"""Where the numbers of a piece of a tensor lie in a `.distcp` file.

`torch.save` wrote the file: an archive (zip, not compressed) with a pickle that names dtype, shape and the order of the
numbers, and the numbers themselves. torch does not read it here: its unpickler takes as much time and memory as a
crafted file asks for, even with `weights_only`.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo

from jetmoe_megatron.runtime.plain_pickle import Record, read_pickle

_MOST_PICKLE = 2**16  # bytes; torch writes about 300
_LOCAL_HEADER = struct.Struct("<26xHH")  # lengths of a name and of the padding to the next multiple of 64
_DTYPES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
}
_KNOWN = {"torch": _DTYPES.keys(), "torch._utils": {"_rebuild_tensor_v2"}, "collections": {"OrderedDict"}}


@dataclass(frozen=True)
class Piece:
    start: int  # byte of the file
    shape: tuple[int, ...]
    dtype: torch.dtype


def find_piece(file: IO[bytes], place: _StorageInfo, shape: Sequence[int], dtype: torch.dtype) -> Piece:
    """The piece that `.metadata` promises at `place`.

    Raises:
        ValueError: something else is there; the message is a short reason.
        OSError: the file cannot be read.
    """
    view = _View(file, place.offset, place.length)
    try:
        with zipfile.ZipFile(view) as archive:
            root = archive.namelist()[0].partition("/")[0]
            pickle = archive.getinfo(f"{root}/data.pkl")
            if pickle.file_size > _MOST_PICKLE or pickle.compress_type != zipfile.ZIP_STORED:
                raise ValueError("not a tensor")
            key, numbers, found = _described(archive.read(pickle))
            if found != (tuple(shape), dtype):
                raise ValueError("another shape or dtype than .metadata says")
            stored = archive.getinfo(f"{root}/data/{key}")
            order = f"{root}/byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("its numbers are not little-endian")
        nbytes = prod(shape) * dtype.itemsize
        if stored.compress_type != zipfile.ZIP_STORED or not stored.file_size == numbers * dtype.itemsize == nbytes:
            raise ValueError("another number of values than its shape has")
        view.seek(stored.header_offset)
        start = stored.header_offset + 30 + sum(_LOCAL_HEADER.unpack(view.read(30)))
        if start + nbytes > place.length:
            raise ValueError("it ends too early")
    except Exception as error:  # zipfile raises many kinds
        if isinstance(error, ValueError) or (isinstance(error, OSError) and error.errno):
            raise
        raise ValueError(f"not a tensor ({type(error).__name__})") from None
    return Piece(place.offset + start, tuple(shape), dtype)


class _View(io.RawIOBase):
    """A part of a file as a file. torch's own (`_create_file_view`) seeks the wrong way from the end."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if self._at < 0:
            raise OSError("before the beginning")  # what zipfile expects
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        content = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def _described(pickle: bytes) -> tuple[str, int, tuple[tuple[int, ...], torch.dtype]]:
    """Which entry holds the numbers, how many, and the tensor's shape and dtype: torch._utils._rebuild_tensor_v2."""
    tensor = read_pickle(pickle, "its pickle", _KNOWN)
    try:
        (kind, storage, key, _, numbers), first, shape, stride = tensor.arguments[:4]
        dtype = _DTYPES[storage.kind]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError("not a tensor of floating-point numbers") from None
    if not isinstance(tensor, Record) or tensor.kind != "_rebuild_tensor_v2" or kind != "storage" or first != 0:
        raise ValueError("not a whole tensor")
    if type(key) is not str or type(numbers) is not int or {type(shape), type(stride)} != {tuple}:
        raise ValueError("not a tensor")
    if any(type(size) is not int for size in (*shape, *stride)):
        raise ValueError("not a tensor")
    steps = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if numbers and any(own != step for own, step, size in zip(stride, steps, shape, strict=True) if size > 1):
        raise ValueError("its numbers are in another order")
    return key, numbers, (shape, dtype)


def read_rows(file: IO[bytes], piece: Piece, first: int = 0, count: int | None = None) -> Tensor:
    """`count` entries of the piece's first axis, from `first` on; by default all of it.

    Raises:
        ValueError: the file ends too early.
    """
    shape = piece.shape if count is None else (count, *piece.shape[1:])
    rows = torch.empty(shape, dtype=piece.dtype)
    if rows.numel():
        file.seek(piece.start + first * prod(piece.shape[1:]) * piece.dtype.itemsize)
        if file.readinto(as_bytes(rows)) < rows.nbytes:  # type: ignore[attr-defined]
            raise ValueError("it ends too early")
    return rows


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor, to write or to read into."""
    return tensor.view(-1).view(torch.uint8).numpy().data
