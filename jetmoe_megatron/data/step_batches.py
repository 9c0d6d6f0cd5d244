"""Which samples a rank reads for each step, and the loaders that read them."""

from __future__ import annotations

import atexit
import gc
import itertools
import multiprocessing
import signal
from collections.abc import Iterator
from typing import cast

import torch
from torch.utils.data import DataLoader, Dataset

from data_tools.errors import InputError
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import HeldOut, Run
from jetmoe_megatron.data.index_cache import IndexCache
from jetmoe_megatron.data.mixture import build_epochs
from jetmoe_megatron.data.sequences import Sample, Sequences

MicroBatch = Sample  # of micro_sequences: each tensor is [micro_sequences, sequence_length]


def micro_batches_of_step(
    step: int, micro_batches: int, micro_sequences: int, data_ranks: int, data_rank: int
) -> list[list[int]]:
    """Sample numbers of each micro-batch of one rank. The ranks together read the step's samples once, in order."""
    step_start = step * micro_batches * data_ranks * micro_sequences
    starts = [step_start + (m * data_ranks + data_rank) * micro_sequences for m in range(micro_batches)]
    return [list(range(start, start + micro_sequences)) for start in starts]


# A GPU must not wait for the disk: the readers are two steps ahead. On a CPU, no core is to spare for them.
READERS_ON_GPU = 2
_STEPS_AHEAD = 1  # of each reader; more would fill the shared memory of a container, which all ranks of a node use


class StepBatches:
    """Iterates over steps: each item is the list of this rank's micro-batches, on the host."""

    def __init__(
        self,
        dataset: Dataset[Sample],
        steps: range,
        micro_batches: int,
        micro_sequences: int,
        data_ranks: int,
        data_rank: int,
        readers: int | None = None,
    ) -> None:
        """readers: processes that read whole steps ahead; 0: none; by default `READERS_ON_GPU`, and none on a CPU."""
        on_gpu = torch.cuda.is_available()
        if readers is None:
            readers = READERS_ON_GPU if on_gpu else 0
        self.micro_sequences = micro_sequences
        self.loader = DataLoader(
            dataset,
            # A step is one item: few tensors pass between processes, whatever the number of micro-batches.
            batch_sampler=_Sampler(steps, micro_batches, micro_sequences, data_ranks, data_rank),
            num_workers=readers,
            prefetch_factor=_STEPS_AHEAD if readers else None,
            multiprocessing_context="fork" if readers else None,  # newer Pythons' default copies all indices
            worker_init_fn=begin_reader,
            pin_memory=on_gpu,
        )

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        try:
            for step in self.loader:
                parts = {name: tensor.split(self.micro_sequences) for name, tensor in step.items()}
                yield [
                    cast("MicroBatch", dict(zip(parts, each, strict=True)))
                    for each in zip(*parts.values(), strict=True)
                ]
        except InputError as error:  # from a worker, with a traceback before the message
            raise type(error)(str(error).rpartition(f"{type(error).__name__}: ")[2].strip()) from None


def begin_reader(worker: int) -> None:
    """In a process that reads data, before it reads."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # if one to the whole job ended it, its rank would not save
    gc.freeze()  # to collect what it shares with its rank would free objects of the GPU


@atexit.register
def _end_readers() -> None:
    """After an uncaught error the readers still run. Python would send them SIGTERM, which they ignore, and wait."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler treats their end as a failure
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class _Sampler:
    """The sample numbers of each step."""

    def __init__(self, steps: range, *position: int) -> None:
        self.steps, self.position = steps, position

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            yield list(itertools.chain(*micro_batches_of_step(step, *self.position)))

    def __len__(self) -> int:
        return len(self.steps)


HELD_OUT_SEED = 0  # not the run's, so that the losses of runs with different seeds can be compared


class HeldOutSamples(Dataset[Sample]):
    """The same random sequences of a held-out set in every run, filled up to whole micro-batches with masked copies."""

    def __init__(self, held_out: HeldOut, run: Run, layout: Layout, cache: IndexCache) -> None:
        """Builds what is missing in the cache. All ranks call it."""
        self.sequences = Sequences(held_out.path, run, cache, HELD_OUT_SEED)
        build_epochs({self.sequences: range(1)}, run.data.build_limit_tokens)
        self.real = min(self.sequences.per_epoch, run.evaluation.sequences)
        group = layout.micro_batch_group  # virtual stages need whole ones
        self.micro_batches = group * -(-self.real // (group * layout.data * run.batch.micro_sequences))

    def __getitem__(self, sample: int) -> Sample:
        item = self.sequences[sample % self.real]
        if sample >= self.real:
            item["loss_mask"] = torch.zeros_like(item["loss_mask"])
        return item
