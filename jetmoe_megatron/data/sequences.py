"""One Megatron indexed dataset as an endless row of training sequences, epoch after epoch.

Each epoch puts the documents in a new order, joins them, cuts them into sequences and shuffles these. Sequence n
depends only on the content, the seed and the sequence length, not on how much of the dataset a run reads. So a change
of the mixture repeats nothing and loses nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np
import torch
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.checks import check_length
from jetmoe_megatron.data.documents import document_of_tokens, end_of_document
from jetmoe_megatron.data.index_cache import IndexCache
from jetmoe_megatron.data.storage import content_key, count_tokens, open_dataset
from jetmoe_megatron.errors import UserError

_OPEN_EPOCHS = 2  # the current one and, around its end, the next


class _Always(TypedDict):
    tokens: torch.Tensor
    labels: torch.Tensor
    loss_mask: torch.Tensor
    position_ids: torch.Tensor


class Sample(_Always, total=False):
    """Each tensor is [sequence_length]; int64, the mask float32."""

    document: torch.Tensor  # with data.mask_attention: see `document_of_tokens`


class Sequences(torch.utils.data.Dataset[Sample]):
    def __init__(self, path: str, run: Run, cache: IndexCache, seed: int) -> None:
        """Opens the dataset; builds nothing."""
        self.path, self.run, self.cache, self.seed = path, run, cache, seed
        self.indexed = open_dataset(path, cache.root)
        self.content = content_key(path, cache.root)
        self.tokens = count_tokens(self.indexed)
        check_length(self.tokens, run.batch.sequence_length, path)  # object storage was not checked before
        self.per_epoch = (self.tokens - 1) // run.batch.sequence_length
        self._epoch = lru_cache(_OPEN_EPOCHS)(self._open)

    def __getitem__(self, number: int) -> Sample:
        epoch, place = divmod(number, self.per_epoch)
        item = self._epoch(epoch)[place]
        if self.run.data.mask_attention:
            item["document"] = document_of_tokens(item["tokens"], end_of_document(self.run).eod)
        return item

    def epochs(self, first: int, last: int) -> range:
        """The epochs of sequences `first` up to, not including, `last`."""
        return range(first // self.per_epoch, -(-last // self.per_epoch))

    def missing(self, epochs: range) -> Iterator[int]:
        return (epoch for epoch in epochs if self._key(epoch) not in self.cache)

    def open(self, epoch: int) -> None:
        """Raises UserError if the epoch's order is missing in the cache, or damaged."""
        self._epoch(epoch)

    def build(self, epoch: int) -> None:
        """Write the epoch's order into the cache."""
        self.cache.add(self._key(epoch), lambda: self._order(epoch))

    def _key(self, epoch: int) -> str:
        return f"{self.content}-{self.run.batch.sequence_length}-seed{self.seed}-epoch{epoch}"

    def _order(self, epoch: int) -> dict[str, np.ndarray]:
        """The three indices of Megatron's GPTDataset, for one epoch."""
        digest = hashlib.sha256(f"{self.seed}, epoch {epoch}".encode()).digest()
        random = np.random.RandomState(int.from_bytes(digest[:4], "little"))
        documents: np.ndarray = np.arange(len(self.indexed), dtype=np.int32)
        random.shuffle(documents)
        sample_index = helpers.build_sample_idx(
            np.array(self.indexed.sequence_lengths),
            documents,
            self.run.batch.sequence_length,
            1,  # epoch
            self.tokens,
            True,  # leave out the last, partial sequence
            1,  # each sequence is followed by a label
        )
        places: np.ndarray = np.arange(len(sample_index) - 1, dtype=np.uint32)
        random.shuffle(places)
        return {"document_index": documents, "sample_index": sample_index, "shuffle_index": places}

    def _open(self, epoch: int) -> GPTDataset:
        data = self.run.data
        config = GPTDatasetConfig(
            random_seed=self.seed,
            sequence_length=self.run.batch.sequence_length,
            blend=([self.path], None),
            split="1,0,0",
            tokenizer=end_of_document(self.run),
            reset_position_ids=data.reset_positions,
            reset_attention_mask=False,  # the mask of a batch is made where it is used: training/step.py
            eod_mask_loss=data.mask_loss,
            create_attention_mask=False,
        )
        shapes = {
            "document_index": (len(self.indexed),),
            "sample_index": (self.per_epoch + 1, 2),
            "shuffle_index": (self.per_epoch,),
        }
        key = self._key(epoch)
        arrays = tuple(self.cache.read(key, name, *shape) for name, shape in shapes.items())
        return _CachedDataset(arrays, self.cache, key, self.indexed, self.path, config)


class _CachedDataset(GPTDataset):
    """Megatron's dataset, with indices that were built before."""

    def __init__(
        self,
        arrays: tuple[np.ndarray, ...],
        cache: IndexCache,
        key: str,
        indexed: IndexedDataset,
        path: str,
        config: GPTDatasetConfig,
    ) -> None:
        self._arrays, self._cache, self._key = arrays, cache, key
        all_documents: np.ndarray = np.empty(0, np.int32)  # the real list takes 4 bytes each, and nothing reads it
        super().__init__(indexed, path, all_documents, None, Split.train, config)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, ...]:
        return self._arrays

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, ...]:
        """The tokens, their documents and, from newer versions of Megatron-Core, the lengths of these.

        Raises UserError if the sequence has another length than when the index was built.
        """
        self._check(idx)
        try:
            sequence = super()._query_document_sample_shuffle_indices(idx)
        except ValueError as error:  # a position outside the file
            raise self._changed() from error
        if len(sequence[0]) != self.config.sequence_length + 1:
            raise self._changed()
        return sequence

    def _check(self, idx: int) -> None:
        """Raises UserError for wrong indices: with them Megatron would read another part of the file."""
        documents, sample_index, places = self._arrays

        def check(name: str, values: np.ndarray, end: int) -> None:
            self._cache.check_values(self._key, name, values, end)

        check("shuffle_index", places[idx : idx + 1], len(places))
        ends = sample_index[places[idx] : int(places[idx]) + 2]
        check("sample_index", ends[:, 0], len(documents))
        check("sample_index", ends[:, 1], 2**62)
        if ends[0, 0] > ends[1, 0]:
            raise self._cache.damage(self._key, "sample_index", "a sequence that ends before it begins")
        check("document_index", documents[ends[0, 0] : ends[1, 0] + 1], len(self.dataset))

    def _changed(self) -> UserError:
        return UserError(
            f"{self.dataset_path}: is not the file that its order was built for: restore the old file, or delete "
            f"{self._cache.root / self._key} to read the new one"
        )
