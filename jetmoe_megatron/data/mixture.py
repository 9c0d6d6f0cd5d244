"""The samples of a whole run: each phase's mixture as a Megatron blend, one after the other.

A data set that several phases name is read on in the next phase where the one before left it, so that nothing
repeats before an epoch is over.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.checks import check_token_ids
from jetmoe_megatron.data.indexed import sequences


class _ReadOn(torch.utils.data.Dataset):
    """A dataset from one of its samples on, as BlendedDataset wants its parts."""

    def __init__(self, dataset: GPTDataset, start: int) -> None:
        self.dataset, self.start = dataset, start
        self.index_split = dataset.index_split
        self.unique_identifiers = {**dataset.unique_identifiers, "start": start}

    def __len__(self) -> int:
        return len(self.dataset) - self.start

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.dataset[self.start + int(index)]


class RunSamples(torch.utils.data.Dataset):
    """Sample n is the n-th sequence that the run trains on."""

    def __init__(self, run: Run, layout: Layout, cache: Path) -> None:
        """Builds Megatron's index files on rank 0 where the cache has none. All ranks must call it."""
        self.vocab_size = run.model.vocab_size
        self.sequence_length = run.batch.sequence_length
        sizes = [steps * layout.global_sequences for steps in layout.phase_steps]
        self.starts = [0, *itertools.accumulate(sizes)]
        self.mixtures = [{d.name: d for d in phase.data if d.weight > 0} for phase in run.phases]
        datasets = _sources(run, self.mixtures, sizes, cache)
        self.names = list(datasets)
        self.blends: list[BlendedDataset] = []
        consumed = dict.fromkeys(self.names, 0)
        for mixture, size in zip(self.mixtures, sizes, strict=True):
            parts = [_ReadOn(datasets[name], consumed[name]) for name in mixture]
            weights = [d.weight for d in mixture.values()]
            config = datasets[next(iter(mixture))].config
            blend = rank_0_first(partial(BlendedDataset, parts, weights, size, config))
            for name, count in _counts(mixture, blend.dataset_index).items():
                consumed[name] += count
            self.blends.append(blend)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, sample: int) -> dict[str, torch.Tensor]:
        phase = bisect.bisect_right(self.starts, sample) - 1
        item = self.blends[phase][sample - self.starts[phase]]
        where = f"data set {list(self.mixtures[phase])[item['dataset_id']]!r}"
        check_token_ids(item["tokens"].numpy(), self.vocab_size, where)
        check_token_ids(item["labels"].numpy(), self.vocab_size, where)
        return {key: item[key] for key in ("tokens", "labels", "loss_mask", "position_ids")}

    def tokens_per_dataset(self, first: int, last: int) -> dict[str, int]:
        """Tokens drawn from each data set by samples `first` up to, not including, `last`."""
        total = dict.fromkeys(self.names, 0)
        for start, blend, mixture in zip(self.starts, self.blends, self.mixtures, strict=False):
            window = blend.dataset_index[max(0, first - start) : max(0, last - start)]
            for name, count in _counts(mixture, window).items():
                total[name] += count * self.sequence_length
        return total


def rank_0_first(build: Callable[[], Any]) -> Any:
    """Rank 0 builds and writes the cache, then the others read it."""
    rank = torch.distributed.get_rank()
    if rank == 0:
        built = build()
    torch.distributed.barrier()
    if rank != 0:
        built = build()
    torch.distributed.barrier()
    return built


def _sources(run: Run, mixtures: list[dict], sizes: list[int], cache: Path) -> dict[str, GPTDataset]:
    """Each data set once, long enough for all phases together."""
    needed: dict[str, int] = {}
    path_of: dict[str, str] = {}
    for phase, mixture, size in zip(run.phases, mixtures, sizes, strict=True):
        for name, dataset in mixture.items():
            # BlendedDataset follows the weights greedily: its error is below one sample per data set.
            needed[name] = needed.get(name, 0) + math.ceil(size * phase.shares[name]) + len(mixture)
            path_of[name] = dataset.path

    def build(name: str) -> GPTDataset:
        return sequences(path_of[name], needed[name], run.batch.sequence_length, run.model.vocab_size, run.seed, cache)

    return {name: rank_0_first(partial(build, name)) for name in needed}


def _counts(mixture: dict, dataset_index: np.ndarray) -> dict[str, int]:
    counts = np.bincount(dataset_index, minlength=len(mixture))
    return dict(zip(mixture, counts.tolist(), strict=True))
