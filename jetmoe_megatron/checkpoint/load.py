"""Fill model and optimizer from a checkpoint: one of a training run, or one made from a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from jetmoe_megatron.checkpoint.common_state import OPTIMIZER_STEPS
from jetmoe_megatron.checkpoint.load_state import load_state
from jetmoe_megatron.checkpoint.model_state import fill_model, sharded_model
from jetmoe_megatron.checkpoint.optimizer_state import empty_state, set_state, sharded, unsharded
from jetmoe_megatron.errors import UserError


def load_checkpoint(path: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Fill model and optimizer from a checkpoint of any layout. All ranks call it.

    Raises:
        UserError: a file is not what it should be.
    """
    state = sharded_model(model)
    parameters: list[Any] = [getattr(entry, "data", None) for entry in nested_values(state)]
    state["optimizer"] = sharded(empty_state(optimizer), state)
    loaded = load_state(path, state)
    if OPTIMIZER_STEPS not in loaded:
        raise UserError(f"{path}: cannot be loaded: its common.pt has no {OPTIMIZER_STEPS}")
    fill_model(model, loaded)
    set_state(optimizer, unsharded(loaded.get("optimizer", {}), parameters), loaded[OPTIMIZER_STEPS])


def load_weights(path: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Fill `model` from the checkpoint `path`, and the optimizer's own fp32 copies of it. All ranks call it.

    The optimizer's moments stay as they are. Tensors are cast to the model's precision.

    Raises:
        UserError: as `load_state`.
    """
    fill_model(model, load_state(path, sharded_model(model)))
    optimizer.reload_model_params()
