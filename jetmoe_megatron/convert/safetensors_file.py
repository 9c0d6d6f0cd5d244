"""A safetensors file written tensor by tensor, equal to the byte to what the safetensors library writes at once.

The file has the length of the header in 8 bytes, the header in JSON, and the raw tensors. The library orders tensors of
one type by name and pads the header with spaces to a multiple of 8.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from math import prod

import torch

from jetmoe_megatron.convert.hf_names import Weight

_CODES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
INDEX = "model.safetensors.index.json"


class Shard:
    """One file of a model."""

    def __init__(self, file: str, weights: Sequence[Weight], dtype: torch.dtype) -> None:
        self.file = file
        self.weights = sorted(weights, key=lambda weight: weight.hugging_face)
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for weight in self.weights:
            start, end = end, end + nbytes(weight, dtype)
            entries[weight.hugging_face] = {
                "dtype": _CODES[dtype],
                "shape": weight.shape,
                "data_offsets": [start, end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.nbytes = len(self.header) + end


def nbytes(weight: Weight, dtype: torch.dtype) -> int:
    return prod(weight.shape) * dtype.itemsize


def split_into_shards(weights: Sequence[Weight], dtype: torch.dtype, shard_bytes: int) -> list[Shard]:
    """A new file begins with the tensor that would exceed `shard_bytes`, as in the released model."""
    groups: list[list[Weight]] = [[]]
    size = 0
    for weight in weights:
        if groups[-1] and size + nbytes(weight, dtype) > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(weight)
        size += nbytes(weight, dtype)
    if len(groups) == 1:
        return [Shard("model.safetensors", groups[0], dtype)]
    names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    return [Shard(name, group, dtype) for name, group in zip(names, groups, strict=True)]


def index_json(shards: Sequence[Shard], dtype: torch.dtype) -> str:
    """The index of a model of several files, as transformers writes it."""
    places = {weight.hugging_face: shard.file for shard in shards for weight in shard.weights}
    total = sum(nbytes(weight, dtype) for shard in shards for weight in shard.weights)
    content = {"metadata": {"total_size": total}, "weight_map": places}
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
