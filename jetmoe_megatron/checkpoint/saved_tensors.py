"""The tensors of a checkpoint, read into any layout's parts of them, by our own code.

Megatron-Core's loading unpickles: up to 0.16 with a setting of the environment, and from 0.19 on by itself
(dist_checkpointing/serialization.py, `load_common_state_dict`). Here nothing is unpickled, and only rows that are asked
for are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
    def fill(self, part: ShardedTensor) -> None:
        """Fill `part.data`, a part of a tensor, and cast to its dtype.

        Raises:
            ValueError: the checkpoint has no such tensor, or it has another shape; its file is damaged.
            OSError: a file cannot be read.
        """
        saved = self._metadata.state_dict_metadata.get(part.key)
        if not isinstance(saved, TensorStorageMetadata):
            raise ValueError(f"it has no tensor {part.key!r}")
        if tuple(saved.size) != part.global_shape:
            raise ValueError(f"{part.key!r} has the shape {list(saved.size)}, not {list(part.global_shape)}")
        assert part.data is not None
        own = part.data.detach()[(None,) * part.prepend_axis_num]  # with the axis of the layers
        for chunk in saved.chunks:
            if box := _common_box(part.global_offset, own.shape, chunk):
                place = self._metadata.storage_data[MetadataIndex(part.key, chunk.offsets)]
                try:
                    with open(self._path / place.relative_path, "rb") as file:
                        _copy(file, find_piece(file, place, chunk.sizes, saved.properties.dtype), box, own)
                except ValueError as error:
                    raise ValueError(f"{place.relative_path}: {part.key!r}: {error}") from None


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


def _copy(file: IO[bytes], piece: Piece, box: _Box, part: Tensor) -> None:
    """Copy `box` from the file into `part`, a few rows at a time."""
    part = _narrow(part, box.in_part, box.shape)
    flat = 0  # axes of length 1 in front, as the one of the layers: rows follow each other along the axis after them
    while flat < len(piece.shape) - 1 and piece.shape[flat] == 1:
        flat += 1
    piece, part = replace(piece, shape=piece.shape[flat:]), part[(0,) * flat]
    if not piece.shape:
        part.copy_(read_rows(file, piece))
        return
    (first, *before), (count, *sizes) = box.in_piece[flat:], box.shape[flat:]
    at_once = max(1, _READ_AT_ONCE // (prod(piece.shape[1:]) * piece.dtype.itemsize))
    for done in range(0, count, at_once):
        rows = read_rows(file, piece, first + done, min(at_once, count - done))
        part[done : done + len(rows)].copy_(_narrow(rows, (0, *before), (len(rows), *sizes)))


def _narrow(tensor: Tensor, starts: Sequence[int], sizes: Sequence[int]) -> Tensor:
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        tensor = tensor.narrow(axis, start, size)
    return tensor
