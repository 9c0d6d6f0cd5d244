"""A run that begins at a checkpoint of another run (`start_from`). The other run is not changed."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

from jetmoe_megatron.checkpoint.checksums import METADATA, find_damage, newest_whole, newest_whole_of
from jetmoe_megatron.checkpoint.progress import read_progress
from jetmoe_megatron.checkpoint.saved_run import is_of_training, read_saved_run, without_checksums
from jetmoe_megatron.config.checks import check_run
from jetmoe_megatron.config.layout import Layout, phase_steps
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.config.yaml_text import parse_yaml
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.resume.may_change import other_keys, other_model, refusal


def apply_start_from(run: Run) -> Run:
    """With `start_from` and `phase`: the phase before `phase` ends at the checkpoint, whatever its configured length.

    Raises:
        UserError: `start_from` cannot be used for that.
    """
    if run.start_from is None:
        if run.phase is not None:
            raise UserError("phase: needs start_from, a checkpoint for that phase to begin at")
        return run
    own, decided = newest_whole(RunFolder.of(run).checkpoints), _decided_before(run)
    if own is not None:
        source = own
    else:
        source = decided if decided and decided.is_dir() else source_of(run.start_from)
        decided = source
        _refuse_other_model(source, run)
    run = run.model_copy(update={"start_from": str(decided or run.start_from)})  # whatever is saved there later
    if run.phase is None:
        return run
    if not is_of_training(source):
        raise UserError(f"phase: {source} was converted from a Hugging Face model and has no phases: remove phase")
    progress = read_progress(source)
    if own is not None and "branched_at" not in progress:
        raise UserError(
            f"start_from: output_dir has {source}, of a run that did not begin at another run's checkpoint: choose "
            "another output_dir"
        )
    tokens = progress["tokens"] if own is None else progress["branched_at"]
    if not 2 <= run.phase <= len(run.phases):
        raise UserError(f"phase: {run.phase} is not a phase after the first one of {len(run.phases)}")
    before = sum(steps * run.batch.global_tokens for steps in phase_steps(run)[: run.phase - 2])
    if tokens <= before:
        raise UserError(f"start_from: {source} is at {tokens} tokens; phase {run.phase} can begin after {before}")
    phases = list(run.phases)
    phases[run.phase - 2] = phases[run.phase - 2].model_copy(update={"tokens": tokens - before})
    run = run.model_copy(update={"phases": phases})
    check_run(run)
    return run


def _decided_before(run: Run) -> Path | None:
    """What an earlier start of this run took from the run folder `start_from`, which may have a newer one by now."""
    assert run.start_from is not None
    if not RunFolder.of(run).config.is_file():
        return None
    try:
        before = Path(parse_yaml(RunFolder.of(run).config.read_text(encoding="utf-8"))["start_from"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    own_folder = before.parent == RunFolder(run.start_from).checkpoints
    return before if own_folder else None


def source_of(path: str) -> Path:
    """The checkpoint at `path`; for a run folder, its newest whole one."""
    source, damage = newest_whole_of(Path(path))
    if damage and os.environ.get("RANK", "0") == "0":
        print(f"warning: start_from: {damage}", file=sys.stderr, flush=True)
    if not source.is_dir():
        raise UserError(f"start_from: {source}: no such folder")
    if is_of_training(source) or without_checksums(source) is None:
        if damage := find_damage(source, quick=True):
            raise UserError(f"start_from: {source} is damaged: {damage}")
        return source
    if not (source / METADATA).is_file():
        way = "make one of it with `jetmoe convert from-hf`" if (source / "config.json").is_file() else "name one"
        raise UserError(f"start_from: {source}: not a checkpoint: {way}")
    return source


def _refuse_other_model(source: Path, run: Run) -> None:
    if is_of_training(source):
        others = other_keys(read_saved_run(source), run, sections=("model", "precision"))
    else:
        others = other_model(source, run)
    if others:
        raise UserError(refusal(source, others, run))


def no_whole_steps(run: Run, tokens: int, layout: Layout | None) -> str | None:
    """None if a checkpoint at `tokens` tokens is at a step of `run`; otherwise a text with the batch sizes that fit."""
    batch = run.batch
    if tokens % batch.global_tokens == 0:
        return None
    unit, least = batch.sequence_length, 1
    if layout is not None:
        unit *= layout.data * batch.micro_sequences
        least = layout.pipeline if layout.virtual_pipeline > 1 else 1  # micro-batches
    fitting = [unit * size for size in _divisors(tokens // unit) if size >= least] if tokens % unit == 0 else []
    below = [size for size in fitting if size < batch.global_tokens][-1:]
    above = [size for size in fitting if size > batch.global_tokens][:1]
    nearest = " and ".join(map(str, below + above))
    way = f"the nearest that fit are {nearest}" if nearest else "none fits: choose another checkpoint"
    return f"is at {tokens} tokens, which is no multiple of batch.global_tokens ({batch.global_tokens}): {way}"


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})
