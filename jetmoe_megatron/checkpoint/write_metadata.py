"""Write `.metadata`, which says where each piece of each tensor lies, and the file that names the format.

The format is torch.distributed.checkpoint's, as Megatron-Core writes it (`torch_dist`); both can read it.

Sources: torch/distributed/checkpoint/metadata.py and filesystem.py (torch 2.10 to 2.14).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

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
from jetmoe_megatron.checkpoint.tensors_file import WrittenPiece

FORMAT_FILE = "metadata.json"
# What Megatron-Core looks for (dist_checkpointing/core.py, `CheckpointingConfig`).
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def write_metadata(folder: Path, files: Iterable[tuple[str, Sequence[WrittenPiece]]]) -> None:
    """
    Args:
        files: name and pieces of each file of tensors, of all ranks.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for file, pieces in files:
        for piece in pieces:
            properties = TensorProperties(dtype=getattr(torch, piece.dtype))
            new = TensorStorageMetadata(properties, torch.Size(piece.whole), [])
            offset = torch.Size(piece.offset)
            tensors.setdefault(piece.name, new).chunks.append(ChunkStorageMetadata(offset, torch.Size(piece.shape)))
            places[MetadataIndex(piece.name, offset)] = _StorageInfo(file, piece.start, piece.length)
    (folder / METADATA).write_bytes(pickle.dumps(Metadata(dict(tensors), storage_data=places)))
    (folder / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")
