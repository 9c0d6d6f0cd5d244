"""Load tensors of a checkpoint in any layout through megatron.core.dist_checkpointing, without its unpickling.

`.metadata` and `common.pt` are read by rules of our own. What is left are tensors, and torch reads each of these with
`weights_only=True` (torch/distributed/checkpoint/filesystem.py:899).
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.api import CheckpointException

from jetmoe_megatron.checkpoint.common_state import LoadsSteps
from jetmoe_megatron.checkpoint.metadata import read_metadata
from jetmoe_megatron.errors import UserError

_FORMAT = CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1)


def load_state(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint `path` holds in the places of `state`, and its `optimizer_steps`, if it has any.

    All ranks call it.

    Raises:
        UserError: a file is not what it should be, or a tensor of another shape.
    """
    try:
        if maybe_load_config(str(path)) != _FORMAT:
            raise ValueError("metadata.json does not name the format of this program's checkpoints")
        metadata = read_metadata(path)
        # strategies/torch.py:795: no argument asks for another reader.
        torch_strategies._get_filesystem_reader = lambda path, **more: _Reader(path, metadata)
        strategies = torch_strategies.TorchDistLoadShardedStrategy(), LoadsSteps()
        # Not whether the ranks together ask for all of each tensor: none asks for what it has no use for.
        return dist_checkpointing.load(state, str(path), *strategies, validate_access_integrity=False)
    except (Exception, CheckpointException) as error:  # the libraries raise of their own and of many kinds
        raise UserError(f"{path}: cannot be loaded: {in_short(error)}") from error


class _Reader(FileSystemReader):
    def __init__(self, path: str, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *arguments: Any, **more: Any) -> Metadata:
        return self._metadata


def in_short(error: BaseException) -> str:
    """torch's exception of several ranks, which is no Exception, holds the first of theirs."""
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, pickle.UnpicklingError):  # torch's advice is to run whatever the file holds
        return "a file holds something other than tensors"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
