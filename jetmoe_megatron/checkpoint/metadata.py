"""Where the tensors of a checkpoint are: torch.distributed.checkpoint's `.metadata`, read by our own code.

That file is a pickle, and torch unpickles it: a crafted file can run code, and can name other pickles for torch to
read. Here it is read into inert records (`plain_pickle.py`). What we need is taken from these records, checked, and put
into new metadata. Everything that loads a checkpoint uses this metadata.

Sources: torch/distributed/checkpoint/metadata.py (torch 2.10 to 2.14), filesystem.py, `_StorageInfo`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from jetmoe_megatron.checkpoint.checksums import METADATA
from jetmoe_megatron.runtime.plain_pickle import Record, read_pickle

# The names in what Megatron-Core and `jetmoe convert from-hf` write. The plan of the save is not used.
_KNOWN = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
}
_FILE = re.compile(r"__\d+_\d+\.distcp")
_MOST = 2**60  # of bytes and numbers
_MOST_DIMENSIONS = 8
T = TypeVar("T")


def read_metadata(checkpoint: Path) -> Metadata:
    """Only tensors and their places: each entry is a `TensorStorageMetadata`, so that torch unpickles no object.

    Raises:
        ValueError: with a short reason.
    """
    try:
        content = (checkpoint / METADATA).read_bytes()
    except OSError as error:
        raise ValueError(f"{METADATA}: {error.strerror}") from None
    found = read_pickle(content, METADATA, _KNOWN)
    try:
        return _metadata(found, most_chunks=len(content))
    except Exception as error:  # values of wrong types raise many kinds
        reason = str(error)[:200] or type(error).__name__
        raise ValueError(f"{METADATA} does not say where the tensors are: {reason}") from None


def _metadata(found: Any, most_chunks: int) -> Metadata:
    """most_chunks: as many as a file of this size can hold. If there are more, many tensors share one list."""
    state = _state(found, "Metadata")
    entries = _dict(state["state_dict_metadata"])
    if sum(len(_list(_state(entry, "TensorStorageMetadata")["chunks"])) for entry in entries.values()) > most_chunks:
        raise ValueError("more parts of tensors than it has bytes")
    tensors = {_text(name): _tensor(entry) for name, entry in entries.items()}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for index, place in _dict(state["storage_data"]).items():
        where = _state(index, "MetadataIndex")
        name, offset = _text(where["fqn"]), _sizes(where["offset"])
        if name not in tensors:
            raise ValueError(f"{name!r} has a place but no shape")
        places[MetadataIndex(name, offset)] = _place(place)
    for name, tensor in tensors.items():
        if not _covers(tensor) or not all(MetadataIndex(name, chunk.offsets) in places for chunk in tensor.chunks):
            raise ValueError(f"parts of {name!r} are missing, or occur twice")
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)


def _tensor(entry: Any) -> TensorStorageMetadata:
    state = _state(entry, "TensorStorageMetadata")
    dtype = _record_of(state["properties"], "TensorProperties").state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a tensor without a dtype")
    size = _sizes(state["size"])
    chunks = [_chunk(chunk, size) for chunk in _list(state["chunks"])]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _covers(tensor: TensorStorageMetadata) -> bool:
    """Whether the parts cover the whole tensor, each value once."""
    chunks = [chunk for chunk in tensor.chunks if chunk.sizes.numel()]
    if sum(chunk.sizes.numel() for chunk in chunks) != tensor.size.numel():
        return False
    if not tensor.size or len(chunks) < 2:
        return True
    start_CD = torch.tensor([chunk.offsets for chunk in chunks])  # C chunks, D dimensions
    end_CD = start_CD + torch.tensor([chunk.sizes for chunk in chunks])
    # Along the axis with the most distinct starts, a chunk can overlap only chunks that start before it ends.
    axis = max(range(len(tensor.size)), key=lambda axis: len(start_CD[:, axis].unique()))
    order_C = start_CD[:, axis].argsort()
    start_CD, end_CD = start_CD[order_C], end_CD[order_C]
    begin_after_C = torch.searchsorted(start_CD[:, axis].contiguous(), end_CD[:, axis].contiguous()).tolist()
    for i, last in enumerate(begin_after_C):
        others = slice(i + 1, last)
        if ((start_CD[i] < end_CD[others]) & (start_CD[others] < end_CD[i])).all(1).any():
            return False
    return True


def _chunk(chunk: Any, size: torch.Size) -> ChunkStorageMetadata:
    state = _state(chunk, "ChunkStorageMetadata")
    offsets, sizes = _sizes(state["offsets"]), _sizes(state["sizes"])
    if not len(offsets) == len(sizes) == len(size) or any(
        offset + length > whole for offset, length, whole in zip(offsets, sizes, size, strict=True)
    ):
        raise ValueError("a part of a tensor lies outside of it")
    return ChunkStorageMetadata(offsets, sizes)


def _place(place: Any) -> _StorageInfo:
    state = _state(place, "_StorageInfo")
    if state.keys() - {"relative_path", "offset", "length"}:
        raise ValueError("a place says more than a file, an offset and a length")
    if not _FILE.fullmatch(file := _text(state["relative_path"])):
        raise ValueError(f"{file[:80]!r} is not a file of a checkpoint")
    return _StorageInfo(file, _number(state["offset"]), _number(state["length"]))


def _record_of(value: Any, kind: str) -> Record:
    if not isinstance(value, Record) or value.kind != kind:
        raise TypeError(f"{getattr(value, 'kind', type(value).__name__)} instead of {kind}")
    return value


def _state(value: Any, kind: str) -> dict[str, Any]:
    return _dict(_record_of(value, kind).state)


def _dict(value: Any) -> dict[Any, Any]:
    return _exactly(value, dict)


def _list(value: Any) -> list[Any]:
    return _exactly(value, list)


def _text(value: Any) -> str:
    return _exactly(value, str)


def _number(value: Any) -> int:
    if not 0 <= _exactly(value, int) < _MOST:
        raise ValueError("a number that no checkpoint has")
    return value


def _sizes(value: Any) -> torch.Size:
    (numbers,) = _record_of(value, "Size").arguments
    if len(_exactly(numbers, tuple)) > _MOST_DIMENSIONS:
        raise ValueError("more dimensions than any tensor has")
    return torch.Size([_number(number) for number in numbers])


def _exactly(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} instead of {kind.__name__}")
    return value
