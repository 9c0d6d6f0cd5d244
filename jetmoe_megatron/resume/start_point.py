"""Where a run goes on: at its newest whole checkpoint, at one that it starts from, or at the beginning."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from jetmoe_megatron.checkpoint.checksums import find_damage, newest_whole
from jetmoe_megatron.checkpoint.folder import DAMAGED, checkpoint_path, newest, set_aside
from jetmoe_megatron.checkpoint.saved_run import (
    is_of_training,
    other_keys,
    read_progress,
    read_saved_run,
    refusal,
    without_checksums,
)
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.ledger import Ledger, fingerprint, ledger_of
from jetmoe_megatron.errors import SharedError, UserError
from jetmoe_megatron.resume.rollback import read_rollback
from jetmoe_megatron.resume.start_from import no_whole_steps, source_of
from jetmoe_megatron.training.together import decided_by_rank_0


@dataclass(frozen=True)
class Start:
    checkpoint: Path | None
    weights_only: bool  # of it: the optimizer and everything else begin anew
    progress: dict[str, Any]  # `tokens` consumed, and what else the checkpoint holds
    ledger: Ledger


def find_start(run: Run, layout: Layout | None = None) -> Start:
    """Looks at names, sizes and small files; no process group is needed.

    Args:
        layout: which batches a message may propose; without it, any.

    Raises:
        UserError: one line that says why the run may not go on from there.
    """
    folder = RunFolder(run)
    checkpoint, weights_only, allowed = newest_whole(folder.checkpoints), False, run
    progress: dict[str, Any] = {"tokens": 0}
    refusals: list[str] = []
    others: dict[str, str] = {}
    if checkpoint is not None:
        if others := other_keys(read_saved_run(checkpoint), run):
            refusals.append(refusal(checkpoint, others, run))
        progress = read_progress(checkpoint)
        if checkpoint != checkpoint_path(folder.checkpoints, progress["tokens"]):
            raise UserError(
                f"{checkpoint}: holds what was saved at {progress['tokens']} tokens: was it copied or renamed?"
            )
    elif left := sorted(folder.checkpoints.glob(f"tokens_*{DAMAGED}*")):
        raise UserError(
            f"{left[-1]}: is damaged, and no whole checkpoint is left: restore one, or begin anew in another output_dir"
        )
    elif run.start_from is not None:
        checkpoint = source_of(run.start_from)
        weights_only = not is_of_training(checkpoint)
        if not weights_only:
            progress = read_progress(checkpoint)
            progress = {key: progress[key] for key in ("tokens", "data")} | {"branched_at": progress["tokens"]}
            allowed = run.model_copy(update={"data": run.data.model_copy(update={"new_blend": True})})
    if checkpoint and (problem := no_whole_steps(run, progress["tokens"], layout)):
        refusals.append(f"{checkpoint}: {problem}")
    progress |= read_rollback(folder.checkpoints, progress["tokens"])
    saved = progress.get("data")
    try:
        where, told = checkpoint or folder.root, {key.rpartition(".")[2] for key in others}
        ledger = ledger_of(allowed, fingerprint(run, folder.data_cache), saved, where, told)
    except UserError as error:
        refusals.append(str(error))
    if refusals:  # all at once: each names the option that permits it
        raise UserError("; ".join(refusals))
    if saved and saved["blend"] != ledger.blend:  # the guard's window holds losses of the old one
        progress.pop("guard", None)
    return Start(checkpoint, weights_only, progress, ledger)


def set_damaged_aside(run: Run) -> None:
    """Check the newest checkpoint byte by byte until one is whole. All ranks call it."""
    root = RunFolder(run).checkpoints
    while checkpoint := decided_by_rank_0(partial(newest, root)):
        damage = _find_damage_together(checkpoint)
        if damage is None:
            return
        aside = decided_by_rank_0(partial(set_aside, checkpoint))
        if torch.distributed.get_rank() == 0:
            print(f"warning: {checkpoint} is damaged: {damage}; set aside as {aside.name}", file=sys.stderr, flush=True)


def refuse_damaged_source(run: Run, start: Start) -> None:
    """Check the checkpoint of another run byte by byte. All ranks call it.

    Raises:
        SharedError: it is damaged.
    """
    source = start.checkpoint
    if source is None or source.parent == RunFolder(run).checkpoints:
        return
    if warning := decided_by_rank_0(partial(without_checksums, source)):  # made by an earlier version
        if torch.distributed.get_rank() == 0:
            print(f"warning: start_from: {warning}", file=sys.stderr, flush=True)
        return
    if damage := _find_damage_together(source):
        raise SharedError(f"start_from: {source} is damaged: {damage}")


def _find_damage_together(checkpoint: Path) -> str | None:
    """Each rank looks at its share of the files; all learn of the first that is bad.

    Raises:
        SharedError: some rank cannot read a file, whatever is in it.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own: tuple[str | None, str | None] = (None, None)  # what is damaged, what cannot be read
    try:
        own = (find_damage(checkpoint, share=(rank, world)), None)
    except OSError as error:
        own = (None, f"rank {rank} cannot read {error.filename}: {error.strerror}")
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, own)
    if unread := next((reason for _, reason in found if reason), None):
        raise SharedError(unread)
    return next((damage for damage, _ in found if damage), None)
