"""The training loop."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from megatron.core import parallel_state

from jetmoe_megatron.checkpoint.store import Saver, load_checkpoint
from jetmoe_megatron.checkpoint.weights import load_weights
from jetmoe_megatron.config import dump_run
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.batches import StepBatches
from jetmoe_megatron.data.index_cache import IndexCache
from jetmoe_megatron.data.mixture import RunSamples
from jetmoe_megatron.errors import EXIT_BAD_STEPS, EXIT_NOT_SAVED, EXIT_RUN_ME_AGAIN
from jetmoe_megatron.model.build import build_model
from jetmoe_megatron.monitor.jsonl import JsonLines
from jetmoe_megatron.monitor.monitor import Monitor, Record, Writer
from jetmoe_megatron.monitor.tensorboard import TensorBoard
from jetmoe_megatron.monitor.terminal import Terminal
from jetmoe_megatron.monitor.wandb import WeightsAndBiases
from jetmoe_megatron.training.bad_steps import record_bad_step
from jetmoe_megatron.training.evaluation import HeldOutLoss
from jetmoe_megatron.training.guard import Guard
from jetmoe_megatron.training.optimizer import build_optimizer, settle_weights, wrap_for_data_parallel
from jetmoe_megatron.training.rollback import roll_back
from jetmoe_megatron.training.schedule import LearningRate
from jetmoe_megatron.training.signals import StopSignals
from jetmoe_megatron.training.start import find_start, refuse_damaged_source, set_damaged_aside
from jetmoe_megatron.training.step import compute_gradients, reduce_step, update_weights
from jetmoe_megatron.training.sync import check_ranks_agree


def train(run: Run, layout: Layout) -> int:
    """Train from the newest checkpoint, or from the start, to the end. Returns the process's exit status."""
    stop = StopSignals()
    while (status := _train(run, layout, stop)) is None:
        pass  # rolled back
    return status


def _train(run: Run, layout: Layout, stop: StopSignals) -> int | None:
    """As `train`, or None after a rollback: it is to be called again."""
    with stop:
        gc.collect()  # the model of before a rollback: it and its hooks hold one another
        folder = RunFolder(run)
        set_damaged_aside(run)
        start = find_start(run)
        refuse_damaged_source(run, start)
        tokens_per_step = run.batch.global_tokens
        progress, ledger = start.progress, start.ledger
        step = progress["tokens"] // tokens_per_step
        guard, action = Guard.load(run.guard, progress.get("guard")), None
        last_step = min(layout.steps, run.debug.max_steps or layout.steps)
        if step >= last_step:
            if torch.distributed.get_rank() == 0:
                print(f"{folder.root}: all {step} steps are done, nothing left to do", flush=True)
            return 0
        cache = IndexCache(folder.data_cache, report=partial(print, flush=True))
        model = wrap_for_data_parallel(run, build_model(run, layout))
        optimizer = build_optimizer(run, model)
        if start.checkpoint:
            load = load_weights if start.weights_only else load_checkpoint
            load(start.checkpoint, model, optimizer)
        samples = RunSamples(run, cache, ledger.began)
        held_out = HeldOutLoss(run, layout, cache)
        learning_rate = schedule_of(run, layout)
        saver = Saver(folder.checkpoints, run, partial(_is_permanent, run, layout))
        monitor = Monitor(_writers(run, layout, folder, step))
        batches = iter(
            StepBatches(
                samples,
                range(step, last_step),
                layout.micro_batches,
                run.batch.micro_sequences,
                layout.data,
                parallel_state.get_data_parallel_rank(),
            )
        )
        while step < last_step:  # a stop is obeyed only where all ranks agree on it
            started = time.perf_counter()
            lr = learning_rate(step * tokens_per_step)
            phase = run.phases[layout.phase_at(step)].name
            losses, grad_norm = compute_gradients(model, optimizer, next(batches))
            reduced, stopping = reduce_step(model, losses, grad_norm, stop=stop.received is not None)
            step += 1
            before, ledger = ledger.read, replace(ledger, read=samples.advance(ledger.read, layout.global_sequences))
            bad = guard.judge(step, phase, reduced["lm_loss"], reduced["grad_norm"])
            if bad is None:
                update_weights(optimizer, grad_norm, lr)
            else:
                action = guard.action
                record_bad_step(folder.bad_steps, step, bad, guard, reduced, before, ledger.read)
                if action != "skip":
                    saver.poll(wait=True)
                    break
            seconds = time.perf_counter() - started
            record: Record = {
                "step": step,
                "phase": phase,
                "tokens": step * tokens_per_step,
                "lr": lr,
                **reduced,
                **({"skipped": bad} if bad else {}),
                "tokens_per_second": tokens_per_step / seconds,
                "step_seconds": seconds,
                **samples.ledger(ledger.read),
            }
            if run.debug.check_sync and step % run.debug.check_sync == 0:
                settle_weights(model)
                check_ranks_agree(model)
            if held_out.is_due(step, last=step == last_step):
                record |= held_out.measure(model)
            started, ending = time.perf_counter(), stopping or step == last_step
            if ending or _save_is_due(run, layout, step):
                settle_weights(model)
                progress |= {"tokens": step * tokens_per_step, "data": ledger.dump(), "guard": guard.dump()}
                saver.save(progress, model, optimizer, wait=ending)
                record["save_stall_seconds"] = time.perf_counter() - started
            else:
                saver.poll()
            monitor.log(record)
            if stopping:
                break
        monitor.close()
        if action == "rollback":
            set_damaged_aside(run)
            start = find_start(run)
            roll_back(folder.checkpoints, start.progress, start.ledger.read, ledger, guard)
            return EXIT_RUN_ME_AGAIN if stopping else None
        if action == "stop":
            return EXIT_BAD_STEPS
    if saver.failed:
        return EXIT_NOT_SAVED
    return 0 if step >= last_step else EXIT_RUN_ME_AGAIN


def schedule_of(run: Run, layout: Layout) -> LearningRate:
    """A phase's shape spans the whole steps that it is rounded up to."""
    phase_tokens = [steps * run.batch.global_tokens for steps in layout.phase_steps]
    return LearningRate(
        max_lr=run.optimizer.max_lr,
        warmup_tokens=run.schedule.warmup_tokens,
        initial_lr_ratio=run.schedule.initial_lr_ratio,
        final_lr_ratio=run.schedule.final_lr_ratio,
        phases=list(zip(phase_tokens, (phase.learning_rate for phase in run.phases), strict=True)),
    )


def _save_is_due(run: Run, layout: Layout, step: int) -> bool:
    """At the end of a phase, and at the first whole step at or after each multiple of `checkpoint.every_tokens`."""
    return step in accumulate(layout.phase_steps) or _passes(run.checkpoint.every_tokens, run, step)


def _is_permanent(run: Run, layout: Layout, tokens: int) -> bool:
    step = tokens // run.batch.global_tokens
    return step in accumulate(layout.phase_steps) or _passes(run.checkpoint.keep_every_tokens, run, step)


def _passes(every: int, run: Run, step: int) -> bool:
    per_step = run.batch.global_tokens
    return every > 0 and step * per_step // every > (step - 1) * per_step // every


def _writers(run: Run, layout: Layout, folder: RunFolder, step: int) -> list[Callable[[], Writer]]:
    if torch.distributed.get_rank() != 0:
        return []
    folder.root.mkdir(parents=True, exist_ok=True)
    folder.config.write_text(dump_run(run), encoding="utf-8")
    writers: list[Callable[[], Writer]] = [
        partial(Terminal, layout.steps, run.logging.every_steps),
        partial(JsonLines, folder.metrics, step),
    ]
    if run.logging.wandb != "off":
        writers.append(partial(WeightsAndBiases, run, folder.logs))
    if run.logging.tensorboard:
        writers.append(partial(TensorBoard, folder.logs / "tensorboard"))
    return writers
