"""Checkpoints are compared with their checksums before anything is loaded, by all ranks together."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data_tools.progress import progress
from jetmoe_megatron.checkpoint.checksums import find_damage
from jetmoe_megatron.checkpoint.folder import newest, set_aside
from jetmoe_megatron.checkpoint.saved_run import without_checksums
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.errors import SharedError, may_pass
from jetmoe_megatron.resume.start_point import StartPoint
from jetmoe_megatron.runtime.rank_0 import decided_by_rank_0


def set_damaged_aside(run: Run) -> None:
    """Check checkpoints byte by byte, the newest first, and rename them until one is whole. All ranks call it."""
    root = RunFolder.of(run).checkpoints
    while checkpoint := decided_by_rank_0(partial(newest, root)):
        damage = _find_damage_together(checkpoint)
        if damage is None:
            return
        aside = decided_by_rank_0(partial(set_aside, checkpoint))
        if torch.distributed.get_rank() == 0:
            print(f"warning: {checkpoint} is damaged: {damage}; set aside as {aside.name}", file=sys.stderr, flush=True)


def refuse_damaged_source(run: Run, start: StartPoint) -> None:
    """Check the checkpoint of another run byte by byte. All ranks call it.

    Raises:
        SharedError: it is damaged.
    """
    source = start.checkpoint
    if source is None or source.parent == RunFolder.of(run).checkpoints:
        return
    if warning := decided_by_rank_0(partial(without_checksums, source)):  # made by an earlier version
        if torch.distributed.get_rank() == 0:
            print(f"warning: start_from: {warning}", file=sys.stderr, flush=True)
        return
    if damage := _find_damage_together(source):
        raise SharedError(f"start_from: {source} is damaged: {damage}")


def _find_damage_together(checkpoint: Path) -> str | None:
    """Each rank checks its share of the files. Returns on all ranks the first damage, or None.

    Raises:
        SharedError: a rank cannot read a file (permission or I/O error).
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own: tuple[str | None, str | None, bool] = (None, None, False)  # what is damaged, what cannot be read, for now
    try:
        with progress(f"checking {checkpoint.name}", here=rank == 0) as show:
            own = (find_damage(checkpoint, share=(rank, world), progress=show), None, False)
    except OSError as error:
        own = (None, f"rank {rank} cannot read {error.filename}: {error.strerror}", may_pass(error))
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, own)
    if unread := next((answer for answer in found if answer[1]), None):
        raise SharedError(*unread[1:])
    return next((damage for damage, *_ in found if damage), None)
