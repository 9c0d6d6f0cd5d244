"""Load a checkpoint's weights alone, in any layout: from a training checkpoint or one made of a Hugging Face model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import unwrap_model


def load_weights(path: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Fill `model` from the checkpoint `path`, and the optimizer's own fp32 copies of it. All ranks call it.

    The optimizer's moments stay as they are. Tensors are cast to the model's precision.
    """
    groups = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    chunks = unwrap_model(model)
    state: dict[str, Any] = {str(i): chunk.sharded_state_dict(metadata=groups) for i, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(state, str(path))
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[str(i)])
    optimizer.reload_model_params()
