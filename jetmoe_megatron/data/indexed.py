"""One Megatron indexed dataset as shuffled training sequences."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split


class EndOfDocument:
    """What GPTDataset asks of a tokenizer while documents are not told apart: nothing."""

    unique_identifiers = {"class": "EndOfDocument"}  # part of Megatron's cache key

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.eod = -1

    @property
    def pad(self) -> int:
        return -1  # never occurs: samples are always full


def sequences(
    path: str, num_samples: int | None, sequence_length: int, vocab_size: int, seed: int, cache: Path
) -> GPTDataset:
    """Shuffled sequences of `sequence_length` tokens and their successors; one epoch when `num_samples` is None.

    Megatron keys its cache by path and settings, not content: a folder per content keeps a rebuilt file from being
    read with an old index.
    """
    indexed = IndexedDataset(path)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        blend=([path], None),
        split="1,0,0",
        path_to_cache=str(cache / content_key(path)),
        tokenizer=EndOfDocument(vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    documents: np.ndarray = np.arange(len(indexed), dtype=np.int32)
    return GPTDataset(indexed, path, documents, num_samples, Split.train, config)


def content_key(path: str) -> str:
    """A short hash of a dataset's index and of the first and last megabyte of its tokens."""
    digest = hashlib.sha256()
    for suffix in (".idx", ".bin"):
        with open(path + suffix, "rb") as file:
            size = file.seek(0, 2)
            digest.update(size.to_bytes(8, "little"))
            for start in (0, max(0, size - 2**20)):
                file.seek(start)
                digest.update(file.read(2**20))
    return digest.hexdigest()[:16]
