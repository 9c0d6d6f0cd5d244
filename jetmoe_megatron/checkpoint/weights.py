"""The model's part of a checkpoint, which any layout can load: a training checkpoint's, or a Hugging Face model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model

from jetmoe_megatron.checkpoint.load_state import load_state


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
