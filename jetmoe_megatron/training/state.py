"""All parts of the training loop, built at the beginning of a run or from the checkpoint where it continues."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from data_tools.progress import above
from jetmoe_megatron.checkpoint.load import load_checkpoint, load_weights
from jetmoe_megatron.checkpoint.saver import Saver
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder, data_cache
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.convert.export import Exports
from jetmoe_megatron.data.index_cache import IndexCache
from jetmoe_megatron.data.mixture import RunSamples
from jetmoe_megatron.data.step_batches import MicroBatch, StepBatches
from jetmoe_megatron.model.build import build_model
from jetmoe_megatron.monitor.alarms import Alarms
from jetmoe_megatron.monitor.jsonl import each_record
from jetmoe_megatron.monitor.memory_growth import MemoryGrowth
from jetmoe_megatron.monitor.monitor import Monitor
from jetmoe_megatron.monitor.trackers import build_monitor
from jetmoe_megatron.report.while_training import Reports
from jetmoe_megatron.resume.start_point import StartPoint
from jetmoe_megatron.runtime.rank_0 import decided_by_rank_0
from jetmoe_megatron.training.held_out_loss import HeldOutLoss
from jetmoe_megatron.training.learning_rate import LearningRate
from jetmoe_megatron.training.loss_guard import Guard
from jetmoe_megatron.training.observers import Observers
from jetmoe_megatron.training.optimizer import build_optimizer, wrap_for_data_parallel
from jetmoe_megatron.training.save_points import SavePoints
from jetmoe_megatron.training.wall_time import WallTime


@dataclass
class TrainingState:
    model: list[DistributedDataParallel]  # the chunks of this pipeline stage
    optimizer: MegatronOptimizer
    samples: RunSamples
    held_out: HeldOutLoss
    learning_rate: LearningRate
    guard: Guard
    save_points: SavePoints
    saver: Saver
    exports: Exports
    clock: WallTime
    observers: Observers
    growth: MemoryGrowth
    alarms: Alarms
    monitor: Monitor
    reports: Reports

    @classmethod
    def build(cls, run: Run, layout: Layout, start: StartPoint, step: int) -> TrainingState:
        """All ranks call it. step: the number of steps that are done."""
        folder, rank = RunFolder.of(run), torch.distributed.get_rank()
        clock = _clock(run, folder.metrics, step, layout.world)
        cache = IndexCache(data_cache(run), report=above, from_seconds=1)
        model = wrap_for_data_parallel(run, build_model(run, layout, draw_weights=start.checkpoint is None))
        optimizer = build_optimizer(run, model)
        if start.checkpoint:
            load = load_weights if start.weights_only else load_checkpoint
            load(start.checkpoint, model, optimizer)
        samples = start.samples(run, cache)
        held_out = HeldOutLoss(run, layout, cache)
        save_points = SavePoints(run, layout)
        exports = Exports(run.checkpoint.export_every_tokens if rank == 0 else 0, folder.exports)

        def is_kept(tokens: int) -> bool:
            return save_points.is_permanent(tokens) or exports.is_reading(tokens)

        return cls(
            model=model,
            optimizer=optimizer,
            samples=samples,
            held_out=held_out,
            learning_rate=LearningRate.of(run, layout),
            guard=Guard.load(run.guard, start.progress.get("guard")),
            save_points=save_points,
            saver=Saver(folder.checkpoints, run, is_kept, exports.checkpoint_published),
            exports=exports,
            clock=clock,
            observers=Observers(run, model, optimizer),
            growth=MemoryGrowth(),
            alarms=Alarms(run),
            reports=Reports(run.logging.report_every_steps if rank == 0 else 0, folder.root),
            monitor=build_monitor(run, layout, rank, step),  # removes the lines of later steps
        )

    def batches(self, run: Run, layout: Layout, steps: range) -> Iterator[list[MicroBatch]]:
        """This rank's micro-batches of each step."""
        rank = parallel_state.get_data_parallel_rank()
        micro = layout.micro_batches, run.batch.micro_sequences
        return iter(StepBatches(self.samples, steps, *micro, layout.data, rank))

    def close(self) -> None:
        """Wait for the work that runs beside the training."""
        self.observers.close()
        self.saver.poll(wait=True)
        self.monitor.close()
        self.reports.close()
        self.exports.wait()


def _clock(run: Run, metrics: Path, step: int, ranks: int) -> WallTime:
    """That of rank 0, which writes the lines, goes on from those of earlier starts. All ranks call it."""
    clock = WallTime.of((), step, ranks)

    def read() -> None:
        nonlocal clock
        clock = WallTime.of(each_record(metrics), step, ranks)

    decided_by_rank_0(read)
    clock.dollars_per_hour = run.logging.dollars_per_gpu_hour
    return clock
