"""Where which tensors of a checkpoint lie: torch.distributed.checkpoint's `.metadata`, read by rules of our own.

That file is a pickle, and torch reads it as one: it runs what a crafted file says, and what it makes of the file says
which other pickles torch reads. Here nothing that the file names is called. It is read into inert records; what it may
say is taken from these, checked, and put into metadata made here. All that loads a checkpoint takes it from here.

Sources: torch/distributed/checkpoint/metadata.py (torch 2.10 to 2.13), filesystem.py, `_StorageInfo`.
"""

from __future__ import annotations

import functools
import pickle
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

from jetmoe_megatron.checkpoint.integrity import METADATA

# What Megatron-Core and `jetmoe convert from-hf` write names these, and dtypes; a plan of the save is not read.
_NAMES = {
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
T = TypeVar("T")


def read_metadata(checkpoint: Path) -> Metadata:
    """Tensors and their places alone: each entry is a `TensorStorageMetadata`, so that torch unpickles no object.

    Raises:
        ValueError: with a short reason.
    """
    try:
        with open(checkpoint / METADATA, "rb") as stream:
            found = _Reader(stream).load()
    except OSError as error:
        raise ValueError(f"{METADATA}: {error.strerror}") from None
    except Exception as error:  # unpickling rubbish raises anything
        raise ValueError(f"{METADATA} cannot be read: {error}") from None
    try:
        return _metadata(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{METADATA} does not say where which tensors lie: {error}") from None


class _Record:
    """What stands for an object of the pickle. It does nothing."""

    kind = ""

    def __new__(cls, *arguments: Any, **more: Any) -> _Record:
        record = super().__new__(cls)
        record.arguments, record.state = arguments, None
        return record

    def __init__(self, *arguments: Any, **more: Any) -> None:
        self.arguments: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


@functools.cache
def _record(kind: str) -> type[_Record]:
    return type(kind, (_Record,), {"kind": kind})


class _Reader(pickle._Unpickler):  # type: ignore[name-defined]  # the one in C takes any memory that a file asks for
    def find_class(self, module: str, name: str) -> Any:
        if name in _NAMES.get(module, ()):
            return _record(name)
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("it names something by a number")


def _metadata(found: Any) -> Metadata:
    state = _state(found, "Metadata")
    tensors = {_text(name): _tensor(entry) for name, entry in _dict(state["state_dict_metadata"]).items()}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for index, place in _dict(state["storage_data"]).items():
        where = _state(index, "MetadataIndex")
        name, offset = _text(where["fqn"]), _sizes(where["offset"])
        if name not in tensors:
            raise ValueError(f"{name!r} has a place and no shape")
        places[MetadataIndex(name, offset)] = _place(place)
    return Metadata(state_dict_metadata=dict(tensors), storage_data=places)


def _tensor(entry: Any) -> TensorStorageMetadata:
    state = _state(entry, "TensorStorageMetadata")
    dtype = _record_of(state["properties"], "TensorProperties").state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("a tensor without a dtype")
    size = _sizes(state["size"])
    chunks = [_chunk(chunk, size) for chunk in _list(state["chunks"])]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


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
        raise ValueError(f"{file!r} is no file of a checkpoint")
    return _StorageInfo(file, _number(state["offset"]), _number(state["length"]))


def _record_of(value: Any, kind: str) -> _Record:
    if not isinstance(value, _Record) or value.kind != kind:
        raise TypeError(f"{getattr(value, 'kind', type(value).__name__)} in the place of {kind}")
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
        raise ValueError(f"a number that no checkpoint has: {value:.3g}")
    return value


def _sizes(value: Any) -> torch.Size:
    (numbers,) = _record_of(value, "Size").arguments
    return torch.Size([_number(number) for number in _exactly(numbers, tuple)])


def _exactly(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"{type(value).__name__} in the place of {kind.__name__}")
    return value
