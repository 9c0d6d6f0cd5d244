"""Build all indices of a run before training, on a machine without GPUs (`jetmoe data prepare`)."""

from __future__ import annotations

import math

from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.data.index_cache import IndexCache
from jetmoe_megatron.data.mixture import Position, RunSamples, build_epochs
from jetmoe_megatron.data.sequences import Sequences
from jetmoe_megatron.data.step_batches import HELD_OUT_SEED


def prepare(run: Run, cache: IndexCache, began: Position) -> None:
    """Build what is missing in the cache, for training from `began` on and for the held-out sets.

    Raises:
        UserError, data_tools.errors.InputError: a data set or the cache cannot be used.
    """
    RunSamples(run, cache, began, limit=math.inf)
    build_epochs({Sequences(d.path, run, cache, HELD_OUT_SEED): range(1) for d in run.evaluation.data}, limit=math.inf)
