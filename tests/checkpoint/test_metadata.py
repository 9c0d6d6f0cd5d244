"""`.metadata` is read by rules of our own: pickles that are nearly right, ask for time or memory, or lack parts."""

from __future__ import annotations

import pickle
import pickletools
import random
import sys
from pathlib import Path
from typing import Any

import pytest
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
from jetmoe_megatron.checkpoint.metadata import read_metadata


def spoilt(content: bytes, chance: random.Random) -> bytes:
    """Nearly right: bytes turned, opcodes moved, doubled or put in another's place, names exchanged."""
    how = chance.randrange(6)
    if how == 0:
        changed = bytearray(content)
        for _ in range(chance.randrange(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    ends = [position for _, _, position in pickletools.genops(content) if position is not None]
    parts = [content[a:b] for a, b in zip(ends, [*ends[1:], len(content)], strict=True)]
    i, j = chance.randrange(len(parts)), chance.randrange(len(parts))
    if how == 1:
        parts[i] = parts[j]
    elif how == 2:
        parts.insert(i, parts[j])
    elif how == 3:
        del parts[i]
    elif how == 4:
        parts[i] = chance.choice([b"R", b"b", b"o", b"\x81", b"\x92", b"Q", b"\x82\x01", b"0", b"2", b"a", b"u", b"s"])
    else:
        names = [b"TensorStorageMetadata", b"ChunkStorageMetadata", b"MetadataIndex", b"_StorageInfo", b"Size"]
        old, new = chance.choice(names), chance.choice([*names, b"BytesStorageMetadata", b"load", b"Tensor"])
        return content.replace(bytes([len(old)]) + old, bytes([len(new)]) + new, chance.choice([1, -1]))
    return b"".join(parts)


@pytest.mark.parametrize("seed", range(4))
def test_pickles_that_are_nearly_right(tmp_path: Path, seed: int) -> None:
    """Each is refused with a reason in one line, or gives metadata of tensors in files of the checkpoint alone."""
    chance, content, taken = random.Random(seed), _small_metadata(), 0
    for _ in range(1500):
        harmed = spoilt(content, chance)
        (tmp_path / METADATA).write_bytes(harmed)
        try:
            metadata = read_metadata(tmp_path)
        except ValueError as error:
            assert str(error).startswith(METADATA)
            continue
        taken += 1
        assert type(metadata) is Metadata and metadata.planner_data is None
        for entry in metadata.state_dict_metadata.values():
            assert type(entry) is TensorStorageMetadata and type(entry.properties) is TensorProperties
            assert type(entry.size) is torch.Size and isinstance(entry.properties.dtype, torch.dtype)
            assert all(type(chunk) is ChunkStorageMetadata for chunk in entry.chunks)
        for index, place in metadata.storage_data.items():
            assert type(index) is MetadataIndex and type(place) is _StorageInfo
            assert "/" not in place.relative_path and place.relative_path.endswith(".distcp")
            assert place.offset >= 0 and place.length >= 0 and place.transform_descriptors is None
    assert 0 < taken < 1000


def _small_metadata() -> bytes:
    size = torch.Size([4, 6])
    chunks = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([2, 6])) for at in (0, 2)]
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, chunks)
    places = {MetadataIndex("w", [at, 0]): _StorageInfo(f"__{at}_0.distcp", 0, 96) for at in (0, 2)}
    return pickle.dumps(Metadata({"w": entry}, storage_data=places))


def test_a_pickle_that_asks_for_memory_or_depth(tmp_path: Path) -> None:
    """Gigabytes by a number of its memo, of a text that is not there, or of a list in a list in a list."""
    for content in (
        b"\x80\x04Nr\xff\xff\xff\x7f.",
        b"\x80\x04\x8e\xff\xff\xff\xff\x00\x00\x00\x00x.",
        b"\x80\x04" + b"]" * 300_000 + b"a" * 299_999 + b".",
        b"\x80\x04" + b"(" * 300_000 + b"t" * 300_000 + b".",
        b"\x80\x04}" + b")" + b"2\x86" * 60 + b"Ns.",  # a key whose hash takes for ever
        b"\x80\x04}" + b")" + b"\x94h\x00h\x00\x86" * 60 + b"Ns.",
        b"\x80\x04}" + b")" + b"\x85" * 3_000_000 + b"Ns.",  # one that takes the whole stack
        b"\x80\x04}(" + keys_with_one_hash(300_000) + b"u.",
        pickle.dumps(Metadata(wide_tensor(4000), storage_data={})),
        b"\x80\x05\x96\x00\x00\x00\x80\x01\x00\x00\x00.",  # 6 GB
    ):
        (tmp_path / METADATA).write_bytes(content)
        with pytest.raises(ValueError, match=r"\.metadata"):
            read_metadata(tmp_path)


def keys_with_one_hash(number: int) -> bytes:
    """Each of them would be compared with all others."""
    keys = [(n * sys.hash_info.modulus).to_bytes(11, "little", signed=True) for n in range(1, number)]
    return b"".join(b"\x8a\x0b" + key + b"N" for key in keys)


def wide_tensor(dimensions: int) -> dict[str, Any]:
    """As many chunks as dimensions, all of them one object."""
    size = torch.Size([1] * dimensions)
    chunk = ChunkStorageMetadata(torch.Size([0] * dimensions), size)
    return {"w": TensorStorageMetadata(TensorProperties(dtype=torch.float32), size, [chunk] * dimensions)}


def test_many_chunks_take_no_time_that_grows_with_their_square(tmp_path: Path) -> None:
    """40,000 took 3.5 s when each was compared with all others. Here each is read."""
    number = 60_000
    sizes = torch.Size([1])
    chunks = [ChunkStorageMetadata(torch.Size([n]), sizes) for n in range(number)]
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([number]), chunks)
    places = {MetadataIndex("w", [n]): _StorageInfo("__0_0.distcp", 0, 96) for n in range(number)}
    (tmp_path / METADATA).write_bytes(pickle.dumps(Metadata({"w": entry}, storage_data=places)))
    assert len(read_metadata(tmp_path).storage_data) == number


def a_tensor(chunks: list[tuple[list[int], list[int]]], places: list[list[int]]) -> bytes:
    parts = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in chunks]
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([4, 6]), parts)
    storage = {MetadataIndex("w", offset): _StorageInfo("__0_0.distcp", 0, 96) for offset in places}
    return pickle.dumps(Metadata({"w": entry}, storage_data=storage))


@pytest.mark.parametrize(
    ("chunks", "places"),
    [
        ([], []),
        ([([0, 0], [2, 6])], [[0, 0]]),
        ([([0, 0], [2, 6]), ([0, 0], [2, 6])], [[0, 0]]),
        ([([0, 0], [3, 6]), ([2, 0], [1, 6])], [[0, 0], [2, 0]]),
        ([([0, 0], [2, 6]), ([2, 0], [2, 6])], [[0, 0]]),
    ],
    ids=["none", "half", "half twice", "one over another", "without a place"],
)
def test_tensors_that_are_not_whole(tmp_path: Path, chunks: Any, places: Any) -> None:
    """The rest would be whatever the memory held."""
    (tmp_path / METADATA).write_bytes(a_tensor(chunks, places))
    with pytest.raises(ValueError, match="parts of 'w' are missing, or occur twice"):
        read_metadata(tmp_path)


def test_a_list_that_many_tensors_share(tmp_path: Path) -> None:
    metadata = pickle.loads(a_tensor([([0, 0], [2, 6]), ([2, 0], [2, 6])], [[0, 0], [2, 0]]))
    metadata.state_dict_metadata["w"].chunks *= 2000
    metadata.state_dict_metadata |= {f"w{i}": metadata.state_dict_metadata["w"] for i in range(2000)}
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="more parts of tensors than it has bytes"):
        read_metadata(tmp_path)
