"""The samples of a whole run: the mixtures of its phases, one after the other.

Each phase continues a data set where the phase before stopped, so nothing repeats before an epoch is over. A run that
changes its blend in the middle of a phase does the same.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from megatron.core.datasets import helpers

from data_tools.progress import progress
from jetmoe_megatron.config.layout import phase_steps
from jetmoe_megatron.config.schema import Phase, Run
from jetmoe_megatron.data.checks import check_token_ids
from jetmoe_megatron.data.index_cache import IndexCache
from jetmoe_megatron.data.sequences import Sample, Sequences
from jetmoe_megatron.errors import UserError


@dataclass(frozen=True)
class Position:
    """How far a run has read."""

    sample: int = 0  # in all
    sequences: dict[str, int] = field(default_factory=dict)  # of each data set


class Order:
    """Which data set each sample of a phase comes from. This is Megatron's blend: each sample comes from the data set
    that is furthest behind its weight."""

    def __init__(self, weights: dict[str, float], size: int, cache: IndexCache) -> None:
        self.names, self.size, self.cache = list(weights), size, cache
        self.weights = np.array(list(weights.values())) / sum(weights.values())
        digest = hashlib.sha256(json.dumps([self.weights.tolist(), size]).encode())
        self.key = f"order-{digest.hexdigest()[:16]}"

    def build(self) -> None:
        self.cache.add(self.key, self._blend)

    def open(self) -> Order:
        """Map the arrays, which must have been built."""
        # For each sample: its data set, as an index into `names`, and how many earlier samples came from that.
        self.data_set: np.ndarray = self.cache.read(self.key, "data_set", self.size)
        self.place: np.ndarray = self.cache.read(self.key, "place", self.size)
        return self

    def at(self, row: int) -> tuple[str, int]:
        """The data set of a sample, and how many earlier samples came from that."""
        self._check(row, row + 1)
        return self.names[self.data_set[row]], int(self.place[row])

    def _check(self, first: int, last: int) -> None:
        self.cache.check_values(self.key, "data_set", self.data_set[first:last], len(self.names))
        self.cache.check_values(self.key, "place", self.place[first:last], self.size)

    def counts(self, first: int, last: int) -> dict[str, int]:
        """Sequences of each data set among samples `first` up to, not including, `last` of the phase."""
        self._check(first, last)
        counts = np.bincount(self.data_set[first:last], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def totals(self) -> dict[str, int]:
        """The counts of the whole phase, taken from the last sample of each data set, without reading all samples."""
        totals = dict.fromkeys(self.names, 0)
        window = 1024
        while self.size:
            start = max(0, self.size - window)
            self._check(start, self.size)
            tail = self.data_set[start:]
            for index, name in enumerate(self.names):
                if len(found := np.flatnonzero(tail == index)):
                    totals[name] = int(self.place[start + found[-1]]) + 1
            if start == 0 or all(totals.values()):
                break
            window *= 8
        return totals

    def _blend(self) -> dict[str, np.ndarray]:
        data_set: np.ndarray = np.zeros(self.size, np.int16)
        place: np.ndarray = np.zeros(self.size, np.int64)
        helpers.build_blending_indices(data_set, place, self.weights, len(self.weights), self.size, False)
        return {"data_set": data_set, "place": place}


@dataclass
class _Stretch:
    """What is left of a phase when the blend begins."""

    first: int  # sample of the run
    order: Order
    read_before: dict[str, int]  # sequences of each data set


class RunSamples(torch.utils.data.Dataset[Sample]):
    """Sample n is the n-th sequence that the run trains on. Samples before `began` belong to an earlier blend."""

    def __init__(
        self,
        run: Run,
        cache: IndexCache,
        began: Position = Position(),
        limit: float | None = None,
    ) -> None:
        """Rank 0 builds what the cache does not hold. All ranks call it.

        Raises:
            UserError: on all ranks, if that is more than `limit` tokens, by default `data.build_limit_tokens`.
        """
        self.run, self.began = run, began
        self.sequences = {name: Sequences(path, run, cache, run.seed) for name, path in _paths(run.phases).items()}
        self.stretches = [_Stretch(first, order, {}) for first, order in orders(run, cache, began.sample)]
        on_rank_0([stretch.order.build for stretch in self.stretches])
        self._open()
        needed = {
            dataset: dataset.epochs(began.sequences.get(name, 0), self.end.sequences[name])
            for name, dataset in self.sequences.items()
        }
        build_epochs(needed, run.data.build_limit_tokens if limit is None else limit)

    def __len__(self) -> int:
        return self.stretches[-1].first + self.stretches[-1].order.size if self.stretches else self.began.sample

    def __getitem__(self, sample: int) -> Sample:
        name, number = self.source(sample)
        item = self.sequences[name][number]
        for key in ("tokens", "labels"):
            check_token_ids(item[key].numpy(), self.run.model.vocab_size, f"data set {name!r}")
        return item

    def source(self, sample: int) -> tuple[str, int]:
        """The data set of a sample, and which of its sequences it is."""
        assert sample >= self.began.sample
        stretch = self.stretches[bisect.bisect_right(self.stretches, sample, key=lambda s: s.first) - 1]
        name, place = stretch.order.at(sample - stretch.first)
        return name, stretch.read_before[name] + place

    def advance(self, position: Position, samples: int) -> Position:
        """The position `samples` samples after `position`."""
        sequences, end = dict.fromkeys(self.sequences, 0) | position.sequences, position.sample + samples
        for stretch in self.stretches:
            first, last = position.sample - stretch.first, end - stretch.first
            for name, count in stretch.order.counts(max(0, first), max(0, last)).items():
                sequences[name] += count
        return Position(end, sequences)

    def tokens_read(self, position: Position) -> dict[str, float]:
        """`dataset_tokens/<name>` and `dataset_epochs/<name>` read since the start of the run."""
        length = self.run.batch.sequence_length
        sequences = dict.fromkeys(self.sequences, 0) | position.sequences
        return {
            **{f"dataset_tokens/{name}": count * length for name, count in sequences.items()},
            **{
                f"dataset_epochs/{name}": sequences[name] / dataset.per_epoch
                for name, dataset in self.sequences.items()
            },
        }

    def _open(self) -> None:
        read = dict.fromkeys(self.sequences, 0) | self.began.sequences
        for stretch in self.stretches:
            stretch.order.open()
            stretch.read_before = dict(read)
            for name, count in stretch.order.totals().items():
                read[name] += count
        self.end = Position(len(self), read)


def orders(run: Run, cache: IndexCache, began: int = 0) -> Iterator[tuple[int, Order]]:
    """(first sample, order) of each phase, or of what is left of it from sample `began` on."""
    per_step = run.batch.global_tokens // run.batch.sequence_length
    ends = list(itertools.accumulate(steps * per_step for steps in phase_steps(run)))
    for phase, start, end in zip(run.phases, [0, *ends], ends, strict=False):
        first = max(start, began)
        if first < end:
            # Sorted by name, as in the fingerprint: their order in the run file does not matter.
            weights = {d.name: d.weight for d in sorted(phase.data, key=lambda d: d.name) if d.weight > 0}
            yield first, Order(weights, end - first, cache)


def build_epochs(needed: dict[Sequences, range], limit: float) -> None:
    """Rank 0 writes the missing orders of epochs into the cache. All ranks call it, and open the first epochs.

    Raises:
        UserError: on all ranks, if the missing epochs have more than `limit` tokens, or if the cache is damaged.
    """
    builds: list[Callable[[], None]] = []
    tokens = 0
    for dataset, epochs in needed.items():
        for epoch in dataset.missing(epochs):
            builds.append(partial(dataset.build, epoch))
            tokens += dataset.tokens
            if tokens > limit:  # a wrong number of tokens in a phase can mean billions of epochs
                raise UserError(
                    f"data.build_limit_tokens: the indices of {tokens:,} tokens or more are missing in the cache, and "
                    f"training builds no more than {limit:,} itself: run `jetmoe data prepare "
                    "RUN.yaml` first"
                )
    on_rank_0(builds)
    for dataset, epochs in needed.items():
        if epochs:
            dataset.open(epochs.start)


def on_rank_0(builds: list[Callable[[], None]]) -> None:
    """Build on rank 0, after all ranks have looked at the same cache. The others wait until it is done."""
    several = torch.distributed.is_initialized()
    if several:
        torch.distributed.barrier()
    if not several or torch.distributed.get_rank() == 0:
        with progress("building indices", "indices") as show:
            for number, build in enumerate(builds):
                show(number, len(builds))
                build()
            show(len(builds), len(builds))
    if several:
        torch.distributed.barrier()


def _paths(phases: list[Phase]) -> dict[str, str]:
    return {d.name: d.path for phase in phases for d in phase.data if d.weight > 0}
