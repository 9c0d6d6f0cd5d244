"""Datasets that are made without data_tools."""

import json
import random
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

# A document is a list of sequences, a sequence a list of ids. Empty ones too.
Documents = list[list[list[int]]]

SENTENCES: Documents = [[[5, 6], [7], [8, 9, 2]], [[10, 2]], [[11], [], [2]], [[]], [[12, 13, 14, 2]]]
_CODES = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}


def records(path: Path) -> list[dict[str, Any]]:
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def texts_of(path: Path) -> list[str]:
    return [record["text"] for record in records(path)]


def by_hand(prefix: Path, documents: Documents, code: int = 8) -> Path:
    """The published binary format, field by field. code: of the dtype, 8 is uint16, 4 int32, 1 uint8."""
    sequences = [sequence for document in documents for sequence in document]
    ids = [i for sequence in sequences for i in sequence]
    Path(f"{prefix}.bin").write_bytes(struct.pack(f"<{len(ids)}{_CODES[code]}", *ids))
    width = struct.calcsize(_CODES[code])
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sequences), len(documents) + 1)
    index += b"".join(struct.pack("<i", len(sequence)) for sequence in sequences)
    offset = 0
    for sequence in sequences:
        index += struct.pack("<q", offset)
        offset += len(sequence) * width
    bound = 0
    for document in documents:
        index += struct.pack("<q", bound)
        bound += len(document)
    Path(f"{prefix}.idx").write_bytes(index + struct.pack("<q", bound))
    return prefix


def parse(prefix: Path) -> Documents | None:
    """The documents that a dataset holds, read field by field; None if its files are not what they should be."""
    index, data = Path(f"{prefix}.idx").read_bytes(), Path(f"{prefix}.bin").read_bytes()
    if len(index) < 34 or index[:9] != b"MMIDIDX\x00\x00":
        return None
    version, code, count, bound_count = struct.unpack("<QBQQ", index[9:34])
    if version != 1 or code not in _CODES or not bound_count or len(index) != 34 + 12 * count + 8 * bound_count:
        return None
    lengths = struct.unpack_from(f"<{count}i", index, 34)
    offsets = struct.unpack_from(f"<{count}q", index, 34 + 4 * count)
    bounds = struct.unpack_from(f"<{bound_count}q", index, 34 + 12 * count)
    width = struct.calcsize(_CODES[code])
    sequences, end = [], 0
    for length, offset in zip(lengths, offsets, strict=True):
        if length < 0 or offset != end or offset + length * width > len(data):
            return None
        sequences.append(list(struct.unpack_from(f"<{length}{_CODES[code]}", data, offset)))
        end += length * width
    if end != len(data) or bounds[0] != 0 or bounds[-1] != count or list(bounds) != sorted(bounds):
        return None
    return [sequences[a:b] for a, b in pairwise(bounds)]


def by_megatron(prefix: Path, documents: Documents, dtype: type[np.integer] = np.uint16) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        ids = [i for sequence in document for i in sequence]
        builder.add_document(torch.tensor(ids, dtype=torch.int64), [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return prefix


def random_documents(count: int, seed: int, vocabulary: int = 400) -> Documents:
    """Documents of one to three sequences, in which no id but the last is 2."""
    source = random.Random(seed)

    def sequence() -> list[int]:
        return [source.randrange(3, vocabulary) for _ in range(source.randrange(1, 30))]

    documents = [[sequence() for _ in range(source.randrange(1, 4))] for _ in range(count)]
    for document in documents:
        document[-1].append(2)
    return documents
