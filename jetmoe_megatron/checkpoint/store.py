"""Save and load model, optimizer and position through megatron.core.dist_checkpointing.

Nothing in training is random (no dropout, no jitter; data order and weights come from the seed and the position), so
there is no random state to keep.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from jetmoe_megatron.checkpoint.folder import UNFINISHED, checkpoint_path, clear_unfinished, keep_last
from jetmoe_megatron.checkpoint.saved_run import PROGRESS_FILE, RUN_FILE
from jetmoe_megatron.config import dump_run
from jetmoe_megatron.config.schema import Run


def save_checkpoint(
    root: Path,
    run: Run,
    progress: dict[str, Any],
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
) -> Path:
    """Write `tokens_<N>.partial`, then give it its name. All ranks call it; returns the published folder.

    progress: `tokens` consumed, and whatever else `read_progress` is to give back.
    """
    path = checkpoint_path(root, progress["tokens"])
    aside = path.with_name(path.name + UNFINISHED)
    first = torch.distributed.get_rank() == 0
    if first:
        clear_unfinished(root)
        aside.mkdir(parents=True)
        (aside / RUN_FILE).write_text(dump_run(run), encoding="utf-8")
        (aside / PROGRESS_FILE).write_text(json.dumps(progress, indent=1), encoding="utf-8")
    torch.distributed.barrier()
    state = _sharded_state(model, optimizer, is_loading=False)
    dist_checkpointing.save(state, str(aside))
    torch.distributed.barrier()
    if first:
        shutil.rmtree(path, ignore_errors=True)
        aside.rename(path)
        keep_last(root, run.checkpoint.keep_last)
    torch.distributed.barrier()
    return path


def load_checkpoint(path: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Fill model and optimizer from a published checkpoint. All ranks call it."""
    state = dist_checkpointing.load(_sharded_state(model, optimizer, is_loading=True), str(path))
    for i, chunk in enumerate(unwrap_model(model)):
        chunk.load_state_dict(state[_model_key(model, i)])
    optimizer.load_state_dict(state["optimizer"])


def _model_key(model: list[DistributedDataParallel], i: int) -> str:
    return "model" if len(model) == 1 else f"model{i}"


def _sharded_state(
    model: list[DistributedDataParallel], optimizer: MegatronOptimizer, is_loading: bool
) -> dict[str, Any]:
    metadata = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    chunks = unwrap_model(model)
    state = {_model_key(model, i): chunk.sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}
    state["optimizer"] = optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state
