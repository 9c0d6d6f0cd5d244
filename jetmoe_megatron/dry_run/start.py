"""Where a start would continue, and whether its checkpoint loads: all that needs no model and no other rank."""

from __future__ import annotations

import sys
from pathlib import Path

from data_tools.printing import say
from jetmoe_megatron.checkpoint.checksums import find_damage_by_threads
from jetmoe_megatron.checkpoint.folder import published
from jetmoe_megatron.checkpoint.load import check_can_load
from jetmoe_megatron.checkpoint.optimizer_state import MASTER, MOMENTS
from jetmoe_megatron.checkpoint.saved_run import without_checksums
from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.run_folder import RunFolder
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.convert.hf_names import weights
from jetmoe_megatron.errors import UserError
from jetmoe_megatron.resume.start_point import StartPoint, find_start_point, none_left


def find_start(run: Run, layout: Layout) -> StartPoint:
    """Compare checkpoints byte by byte with their checksums, as a start does, and change nothing.

    Raises:
        UserError: the run may not continue from there, or the checkpoint cannot be loaded.
    """
    start = find_start_point(run, layout, find=_newest_whole)
    if checkpoint := start.checkpoint:
        if checkpoint.parent != RunFolder.of(run).checkpoints:
            _check_source(checkpoint)
        check_can_load(checkpoint, _shapes(run, start.weights_only), start.weights_only)
    return start


def _newest_whole(root: Path) -> Path | None:
    """As a start finds it, which sets the damaged ones aside."""
    checkpoints = published(root)
    for checkpoint in reversed(checkpoints):
        damage = find_damage_by_threads(checkpoint)
        if damage is None:
            return checkpoint
        say(f"warning: {checkpoint} is damaged: {damage}; a start would set it aside", sys.stderr)
    if checkpoints:
        raise none_left(checkpoints[-1])
    return None


def _check_source(checkpoint: Path) -> None:
    """Of another run, or converted."""
    if warning := without_checksums(checkpoint):
        say(f"warning: start_from: {warning}", sys.stderr)
    elif damage := find_damage_by_threads(checkpoint):
        raise UserError(f"start_from: {checkpoint} is damaged: {damage}")


def _shapes(run: Run, weights_only: bool) -> dict[str, tuple[int, ...]]:
    """Of all tensors of a checkpoint, which do not depend on the layout."""
    shapes: dict[str, tuple[int, ...]] = {}
    for weight in weights(run.model):
        stack = () if weight.layer is None else (run.model.num_layers,)
        shapes[weight.megatron] = (*stack, *weight.megatron_shape)
    if weights_only:
        return shapes
    kinds = MOMENTS if run.precision == "fp32" else (*MOMENTS, MASTER)
    return shapes | {f"optimizer.{kind}.{name}": shape for name, shape in shapes.items() for kind in kinds}
