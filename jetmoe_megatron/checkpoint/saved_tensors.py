"""The tensors of a checkpoint, read into any layout's parts of them, by our own code.

Megatron-Core's loading unpickles: up to 0.16 with a setting of the environment, and from 0.19 on by itself
(dist_checkpointing/serialization.py, `load_common_state_dict`). Here nothing is unpickled, and only rows that are asked
for are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from jetmoe_megatron.checkpoint.metadata import read_metadata
from jetmoe_megatron.checkpoint.pieces import Piece, find_piece, read_rows
from jetmoe_megatron.checkpoint.write_metadata import FORMAT, FORMAT_FILE

_READ_AT_ONCE = 2**26  # bytes
_WORTH_A_SEEK = 2**16  # bytes: parts of rows that are shorter are cut out of whole rows
_MOST_FORMAT = 2**12  # bytes


class SavedTensors:
    def __init__(self, path: Path) -> None:
        """
        Raises:
            ValueError: it is not a checkpoint of this program; the message is a short reason.
            OSError: a file cannot be read.
        """
        if _read_format(path) != FORMAT:
            raise ValueError(f"{FORMAT_FILE} does not name the format of this program's checkpoints")
        self._path, self._metadata = path, read_metadata(path)

    @torch.no_grad()
    def fill(self, part: ShardedTensor, numbers_N: Tensor, first: int = 0) -> None:
        """Fill `numbers_N` with the numbers of the flattened `part` from `first` on, cast to its dtype.

        Little more than these numbers is read, and 64 MiB at most are held beside them.

        Args:
            part: names the tensor and the place in it; its data is not used.
            numbers_N: flat and contiguous, on any device.

        Raises:
            ValueError: the checkpoint has no such tensor, or it has another shape; its file is damaged.
            OSError: a file cannot be read.
        """
        saved = self._find(part.key, part.global_shape)
        shape = (*[1] * part.prepend_axis_num, *part.local_shape)  # with the axis of the layers
        done = 0
        for start, sizes in _boxes(shape, first, first + len(numbers_N)):
            target = numbers_N[done : done + prod(sizes)].view(sizes)
            done += target.numel()
            offset = [own + inner for own, inner in zip(part.global_offset, start, strict=True)]
            for chunk in saved.chunks:
                if box := _common_box(offset, sizes, chunk):
                    with self._opened(part.key, saved, chunk) as (file, piece):
                        _copy(file, piece, box.in_piece, _narrow(target, box.in_part, box.shape))

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Find all pieces of a tensor, without reading their numbers.

        Raises:
            ValueError, OSError: as `fill`.
        """
        saved = self._find(name, shape)
        for chunk in saved.chunks:
            with self._opened(name, saved, chunk):
                pass

    def _find(self, name: str, shape: Sequence[int]) -> TensorStorageMetadata:
        saved = self._metadata.state_dict_metadata.get(name)
        if not isinstance(saved, TensorStorageMetadata):
            raise ValueError(f"it has no tensor {name!r}")
        if tuple(saved.size) != tuple(shape):
            raise ValueError(f"{name!r} has the shape {list(saved.size)}, not {list(shape)}")
        return saved

    @contextmanager
    def _opened(
        self, name: str, saved: TensorStorageMetadata, chunk: ChunkStorageMetadata
    ) -> Iterator[tuple[IO[bytes], Piece]]:
        place = self._metadata.storage_data[MetadataIndex(name, chunk.offsets)]
        try:
            with open(self._path / place.relative_path, "rb") as file:
                yield file, find_piece(file, place, chunk.sizes, saved.properties.dtype)
        except ValueError as error:
            raise ValueError(f"{place.relative_path}: {name!r}: {error}") from None


def _boxes(shape: Sequence[int], first: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The numbers `first` to `end` of a flattened tensor as (start, sizes) of boxes, in their order."""
    if first >= end:
        return
    if not shape:
        yield (), ()
        return
    row, inner = prod(shape[1:]), shape[1:]
    low, high = -(-first // row), end // row  # the whole rows are those from `low` to `high`

    def part_of_row(index: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        for start, sizes in _boxes(inner, max(first - index * row, 0), min(end - index * row, row)):
            yield (index, *start), (1, *sizes)

    yield from part_of_row(low - 1)
    if low < high:
        yield (low, *[0] * len(inner)), (high - low, *inner)
    if low <= high:
        yield from part_of_row(high)


def _read_format(path: Path) -> Any:
    with open(path / FORMAT_FILE, "rb") as file:
        content = file.read(_MOST_FORMAT)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


@dataclass(frozen=True)
class _Box:
    """What a piece of a file and a part of a layout have in common: its place in both."""

    in_piece: tuple[int, ...]
    in_part: tuple[int, ...]
    shape: tuple[int, ...]


def _common_box(offset: Sequence[int], shape: Sequence[int], chunk: ChunkStorageMetadata) -> _Box | None:
    """offset, shape: of the part in the whole tensor. None: nothing in common."""
    axes = range(len(shape))
    start = [max(offset[axis], chunk.offsets[axis]) for axis in axes]
    end = [min(offset[axis] + shape[axis], chunk.offsets[axis] + chunk.sizes[axis]) for axis in axes]
    if any(end[axis] <= start[axis] for axis in axes):
        return None
    return _Box(
        tuple(start[axis] - chunk.offsets[axis] for axis in axes),
        tuple(start[axis] - offset[axis] for axis in axes),
        tuple(end[axis] - start[axis] for axis in axes),
    )


def _copy(file: IO[bytes], piece: Piece, start: Sequence[int], target: Tensor) -> None:
    """Copy a box of the piece, which begins at `start` and has the shape of `target`."""
    if not piece.shape:
        target.copy_(read_rows(file, piece))
        return
    (first, *before), (count, *sizes) = start, target.shape
    row = prod(piece.shape[1:]) * piece.dtype.itemsize
    needed = prod(sizes) * piece.dtype.itemsize
    if sizes and (row > _READ_AT_ONCE or _WORTH_A_SEEK <= needed < row or count == 1):
        for index in range(count):
            inner = replace(piece, start=piece.start + (first + index) * row, shape=piece.shape[1:])
            _copy(file, inner, before, target[index])
        return
    at_once = max(1, _READ_AT_ONCE // row)
    for done in range(0, count, at_once):
        rows = read_rows(file, piece, first + done, min(at_once, count - done))
        target[done : done + len(rows)].copy_(_narrow(rows, (0, *before), (len(rows), *sizes)))


def _narrow(tensor: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        tensor = tensor.narrow(axis, start, size)
    return tensor
