"""The model's part of a checkpoint, which any layout can load: a training checkpoint's, or a Hugging Face model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from jetmoe_megatron.checkpoint.integrity import refuse_code
from jetmoe_megatron.errors import UserError


def sharded_model(model: list[DistributedDataParallel]) -> dict[str, Any]:
    """The weights of each of this rank's chunks as Megatron's ShardedTensors, and nothing that would be pickled."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    chunks = {}
    for i, chunk in enumerate(unwrap_model(model)):
        state = chunk.sharded_state_dict(metadata=metadata)
        # Megatron's linear layers add an empty `_extra_state` each.
        chunks[f"model{i}"] = {key: entry for key, entry in state.items() if not isinstance(entry, ShardedObject)}
    return chunks


def fill_model(model: list[DistributedDataParallel], state: dict[str, Any]) -> None:
    """From what was loaded in the place of `sharded_model`."""
    for i, chunk in enumerate(unwrap_model(model)):
        chunk.load_state_dict(state[f"model{i}"])


def load_weights(path: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Fill `model` from the checkpoint `path`, and the optimizer's own fp32 copies of it. All ranks call it.

    The optimizer's moments stay as they are. Tensors are cast to the model's precision.

    Raises:
        UserError: as `load_state`.
    """
    fill_model(model, load_state(path, sharded_model(model)))
    optimizer.reload_model_params()


def load_state(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint `path` holds in the places of `state`. All ranks call it.

    Raises:
        UserError: a file is not what it should be, or a tensor of another shape.
    """
    try:
        refuse_code(path)
        # Not whether the ranks together ask for all of each tensor: none asks for what it has no use for.
        return dist_checkpointing.load(state, str(path), validate_access_integrity=False)
    except (Exception, CheckpointException) as error:  # the libraries raise of their own and of many kinds
        raise UserError(f"{path}: cannot be loaded: {in_short(error)}") from error


def in_short(error: BaseException) -> str:
    """torch's exception of several ranks, which is no Exception, holds the first of theirs."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
