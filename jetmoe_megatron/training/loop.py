"""The training loop."""

from __future__ import annotations

import gc
from dataclasses import replace
from functools import partial

import torch

from jetmoe_megatron.checkpoint.folder import newest
from jetmoe_megatron.config.flops import step_flops
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model.rotary import forget_angles
from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.report.write import write_report
from jetmoe_megatron.resume.damage import refuse_damaged_source, set_damaged_aside
from jetmoe_megatron.resume.rollback import roll_back
from jetmoe_megatron.resume.start_point import find_start_point
from jetmoe_megatron.runtime.device import peak_memory
from jetmoe_megatron.runtime.flight_recorder import make_folder
from jetmoe_megatron.runtime.rank_0 import decided_by_rank_0
from jetmoe_megatron.stopping import ExitStatus
from jetmoe_megatron.training.announce import announce
from jetmoe_megatron.training.bad_step_log import record_bad_step
from jetmoe_megatron.training.held_out_loss import is_due, is_owed
from jetmoe_megatron.training.metrics import reduce_metrics, speed
from jetmoe_megatron.training.optimizer import settle_weights
from jetmoe_megatron.training.ranks.replicas import check_ranks_agree
from jetmoe_megatron.training.ranks.run_lock import claimed
from jetmoe_megatron.training.ranks.same_run import check_ranks_read_the_same, check_ranks_share
from jetmoe_megatron.training.ranks.time_limits import lengthen_time_limits, shorten_time_limits
from jetmoe_megatron.training.state import TrainingState
from jetmoe_megatron.training.step import compute_gradients, update_weights
from jetmoe_megatron.training.steps_left import nothing_left, steps_left
from jetmoe_megatron.training.stop_signals import StopSignals


def train(run: Run, layout: Layout) -> int:
    """Train from the newest checkpoint, or from the start, to the end. Returns the process's exit status."""
    check_ranks_read_the_same(run)
    folder = RunFolder.of(run)
    with StopSignals() as stop, claimed(folder.root):
        check_ranks_share(folder.root)
        make_folder()
        while (status := _train(run, layout, stop)) is None:
            forget_angles()
            gc.collect()  # the model from before the rollback: it and its hooks refer to each other
        if torch.distributed.get_rank() == 0:
            write_report(folder.root)
    if status == ExitStatus.RUN_ME_AGAIN and torch.distributed.get_rank() == 0:
        print(f"stopped at {newest(folder.checkpoints)}: run the same command again to continue", flush=True)
    return status


def _train(run: Run, layout: Layout, stop: StopSignals) -> int | None:
    """As `train`, or None after a rollback."""
    set_damaged_aside(run)
    start, folder = decided_by_rank_0(partial(find_start_point, run)), RunFolder.of(run)
    refuse_damaged_source(run, start)
    tokens_per_step = run.batch.global_tokens
    flops = step_flops(run.model, run.batch.sequence_length, tokens_per_step).with_attention
    (step, last_step), ledger = steps_left(run, layout, start), start.ledger
    first_step = step + 1
    owed = decided_by_rank_0(partial(is_owed, run, step, last=step == last_step))
    if step >= last_step and not owed:
        if torch.distributed.get_rank() == 0:
            print(nothing_left(run, layout, last_step), flush=True)
        return 0
    announce(start.checkpoint, step)
    state = TrainingState.build(run, layout, start, step)
    model, optimizer, samples, guard, clock = state.model, state.optimizer, state.samples, state.guard, state.clock
    if owed:
        state.monitor.amend(step, state.held_out.measure(model))
    batches, stopping = state.batches(run, layout, range(step, last_step)), False
    bad: str | None = None
    clock.end("start_seconds")
    while step < last_step and not stopping:  # a stop counts only after all ranks agreed on it
        phase, lr = run.phases[layout.phase_at(step)].name, state.learning_rate(step * tokens_per_step)
        micro_batches, waited = next(batches), clock.end("step_seconds")
        state.observers.begin(step + 1)
        losses, grad_norm = compute_gradients(model, optimizer, micro_batches)
        own_seconds = state.observers.gradients()
        metrics, stopping = reduce_metrics(model, losses, grad_norm, waited, stop.received is not None, own_seconds)
        step += 1
        before, ledger = ledger.read, replace(ledger, read=samples.advance(ledger.read, layout.global_sequences))
        bad = guard.judge(step, phase, metrics.lm_loss, metrics.grad_norm)
        if bad is None:
            with state.observers.update():
                update_weights(optimizer, grad_norm, lr)
        else:
            record_bad_step(folder.bad_steps, step, bad, guard, metrics, before, ledger.read)
            if guard.action != "skip":
                break
        seconds, ending = waited + clock.end("step_seconds"), stopping or step == last_step
        record: Record = {
            "step": step,
            "phase": phase,
            "tokens": step * tokens_per_step,
            "lr": lr,
            **metrics.dump(),
            **({"skipped": bad} if bad else {}),
            "tokens_per_second": tokens_per_step / seconds,
            **speed(run, flops / seconds / layout.world / 1e12),
            **peak_memory(),
            **samples.tokens_read(ledger.read),
            **state.observers.end(step * tokens_per_step, ending),
        }
        clock.end("other_seconds")
        if run.debug.check_sync and step % run.debug.check_sync == 0:
            settle_weights(model)
            check_ranks_agree(model)
            clock.end("other_seconds")
        if is_due(run, step, last=step == last_step) and not stopping:  # a stop leaves time for the save only
            record |= state.held_out.measure(model)
            clock.end("evaluation_seconds")
        # The line comes before the save, so that a published checkpoint has the lines of all its steps.
        record |= clock.new_line(metrics.data_wait_seconds, useful=bad is None)
        record |= state.growth.add(record)
        record |= {"alarms": raised} if (raised := state.alarms.judge(record)) else {}
        state.monitor.log(record)
        state.reports.step_done(step)
        clock.end("other_seconds")
        if ending or state.save_points.is_due(step):
            settle_weights(model)
            progress = {"tokens": step * tokens_per_step, "data": ledger.dump(), "guard": guard.dump()}
            state.saver.save(start.progress | progress, model, optimizer, wait=ending)
        else:
            state.saver.poll()
        clock.end("save_stall_seconds")
        if step == first_step:
            shorten_time_limits(run)
    state.close()
    if bad and guard.action == "stop":
        return ExitStatus.BAD_STEPS
    if bad and guard.action == "rollback":
        lengthen_time_limits(run)
        set_damaged_aside(run)
        start = decided_by_rank_0(partial(find_start_point, run))
        kept, window = start.ledger.read, guard.back_to(start.progress.get("guard"))
        roll_back(folder, start.progress["tokens"], ledger.back_to(kept), window.dump())
        return ExitStatus.RUN_ME_AGAIN if stopping else None
    if state.saver.failed:
        return ExitStatus.NOT_SAVED
    done = step >= last_step and not (stopping and is_due(run, step, last=True))
    return 0 if done else ExitStatus.RUN_ME_AGAIN
