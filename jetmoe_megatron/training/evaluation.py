"""The loss on data that is not trained on."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.batches import HeldOutSamples, StepBatches
from jetmoe_megatron.data.index_cache import IndexCache
from jetmoe_megatron.training.step import evaluate


class HeldOutLoss:
    """All ranks build it and measure together. Without held-out data it is never due."""

    def __init__(self, run: Run, layout: Layout, cache: IndexCache) -> None:
        self.run, self.layout = run, layout
        self.samples = {d.name: HeldOutSamples(d, run, layout, cache) for d in run.evaluation.data}

    def is_due(self, step: int, last: bool) -> bool:
        every = self.run.evaluation.every_steps
        return bool(self.samples) and (last or (every > 0 and step % every == 0))

    def measure(self, model: list[DistributedDataParallel]) -> dict[str, float]:
        """`held_out_loss/<name>` in nats per token of each set, and `held_out_loss`, the mean of all."""
        losses = {name: self._loss(model, samples) for name, samples in self.samples.items()}
        return {
            "held_out_loss": sum(losses.values()) / len(losses),
            **{f"held_out_loss/{name}": loss for name, loss in losses.items()},
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
