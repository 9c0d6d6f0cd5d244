"""The loss on data that is not trained on."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.index_cache import IndexCache
from jetmoe_megatron.data.step_batches import HeldOutSamples, StepBatches
from jetmoe_megatron.monitor.jsonl import each_record
from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.training.step import evaluate


def is_due(run: Run, step: int, last: bool) -> bool:
    """Whether to measure after `step` steps; `last`: these are all. Without held-out data, never."""
    every = run.evaluation.every_steps
    return bool(run.evaluation.data) and (last or (every > 0 and step % every == 0))


def times_due(run: Run, after: int, until: int, last: int) -> int:
    """How many steps after step `after`, up to `until`, it is due at. last: of the run's steps."""
    if not run.evaluation.data:
        return 0
    every = run.evaluation.every_steps
    at_multiples = until // every - after // every if every else 0
    return at_multiples + (after < last <= until and not (every and last % every == 0))


def is_owed(run: Run, step: int, last: bool) -> bool:
    """Whether the line of `step`, where the run continues, lacks the loss because a stop left no time to measure it."""
    lines = each_record(RunFolder.of(run).metrics) if is_due(run, step, last) else ()
    return any(record["step"] == step and "held_out_loss" not in record for record in lines)


class HeldOutLoss:
    """All ranks build it and measure together."""

    def __init__(self, run: Run, layout: Layout, cache: IndexCache) -> None:
        self.run, self.layout = run, layout
        self.samples = {d.name: HeldOutSamples(d, run, layout, cache) for d in run.evaluation.data}
        self.bytes_per_token = _bytes_per_token(run, self.samples) if torch.distributed.get_rank() == 0 else {}

    def measure(self, model: list[DistributedDataParallel]) -> Record:
        """`held_out_loss/<name>` in nats per token of each set, and `held_out_loss`, the mean of all.

        On rank 0 also `bits_per_byte/<name>`, if the tokenizer's tokens spell their text.
        """
        losses = {name: self._loss(model, samples) for name, samples in self.samples.items()}
        return {
            "held_out_loss": sum(losses.values()) / len(losses),
            **{f"held_out_loss/{name}": loss for name, loss in losses.items()},
            **{f"bits_per_byte/{name}": losses[name] / math.log(2) / b for name, b in self.bytes_per_token.items()},
        }

    def _loss(self, model: list[DistributedDataParallel], samples: HeldOutSamples) -> float:
        rank = parallel_state.get_data_parallel_rank()
        batches = StepBatches(
            samples,
            range(1),
            samples.micro_batches,
            self.run.batch.micro_sequences,
            self.layout.data,
            rank,
        )
        return evaluate(model, next(iter(batches)))


def _bytes_per_token(run: Run, samples: dict[str, HeldOutSamples]) -> dict[str, float]:
    """Of each set, over the tokens whose loss is measured."""
    if not run.tokenizer or not samples:
        return {}
    from data_tools.engines import open_reference  # its packages are not needed without a tokenizer

    table_V = open_reference(Path(run.tokenizer)).bytes_of_ids()
    if table_V is None:
        return {}
    found = {}
    for name, of_set in samples.items():
        items = [of_set[number] for number in range(of_set.real)]
        labels_T = torch.cat([item["labels"][item["loss_mask"] > 0] for item in items]).numpy()
        whole = int(table_V[labels_T[labels_T < len(table_V)]].sum())
        if whole:
            found[name] = whole / len(labels_T)
    return found
