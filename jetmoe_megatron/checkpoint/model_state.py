"""The model's part of a checkpoint, which any layout can load."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model


def sharded_model(model: list[DistributedDataParallel]) -> dict[str, Any]:
    """The weights of each of this rank's chunks as Megatron's ShardedTensors, and nothing that would be pickled."""
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    chunks = {}
    for i, chunk in enumerate(unwrap_model(model)):
        state = chunk.sharded_state_dict(metadata=metadata)
        # Megatron's linear layers add an empty `_extra_state` each.
        chunks[f"model{i}"] = {key: entry for key, entry in state.items() if not isinstance(entry, ShardedObject)}
    return chunks
