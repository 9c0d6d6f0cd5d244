"""Load tensors of a checkpoint in any layout through megatron.core.dist_checkpointing, without its unpickling.

`.metadata`, `common.pt` and the pieces of tensors are read by our own code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, Metadata, ReadItem
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.futures import Future

from jetmoe_megatron.checkpoint.common_state import LoadsSteps
from jetmoe_megatron.checkpoint.metadata import read_metadata
from jetmoe_megatron.checkpoint.pieces import find_piece, read_rows
from jetmoe_megatron.errors import UserError

_FORMAT = CheckpointingConfig(sharded_backend="torch_dist", sharded_backend_version=1)


def load_state(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """What the checkpoint `path` has for the entries of `state`, and its `optimizer_steps`, if it has any.

    All ranks call it.

    Raises:
        UserError: a file is not what it should be, or a tensor of another shape.
    """
    try:
        if maybe_load_config(str(path)) != _FORMAT:
            raise ValueError("metadata.json does not name the format of this program's checkpoints")
        metadata = read_metadata(path)
        # strategies/torch.py:795: no argument can choose another reader.
        torch_strategies._get_filesystem_reader = lambda path, **more: _Reader(path, metadata)
        strategies = torch_strategies.TorchDistLoadShardedStrategy(), LoadsSteps()
        # No check that the ranks together load all of each tensor: each loads only what it needs.
        return dist_checkpointing.load(state, str(path), *strategies, validate_access_integrity=False)
    except (Exception, CheckpointException) as error:  # the libraries raise many kinds
        raise UserError(f"{path}: cannot be loaded: {reason_of(error)}") from error


class _Reader(FileSystemReader):
    def __init__(self, path: str, metadata: Metadata) -> None:
        super().__init__(path)
        self._metadata = metadata

    def read_metadata(self, *arguments: Any, **more: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """As FileSystemReader.read_data, but by our own code, and only the rows that are needed."""
        for item in plan.items:
            file = self._metadata.storage_data[item.storage_index].relative_path
            try:
                self._read(item, planner, Path(self.path) / file)
            except ValueError as error:
                raise ValueError(f"{file}: {item.storage_index.fqn!r}: {error}") from None
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(self, item: ReadItem, planner: LoadPlanner, path: Path) -> None:
        index = item.storage_index
        entry = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        shape = next(chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset)
        with open(path, "rb") as file:
            piece = find_piece(file, self._metadata.storage_data[index], shape, entry.properties.dtype)
            if not shape:
                rows = read_rows(file, piece)
            else:
                rows = read_rows(file, piece, item.storage_offsets[0], item.lengths[0])
                offsets = [0, *item.storage_offsets[1:]]
                rows = narrow_tensor_by_index(rows, offsets, item.lengths)
        target = planner.resolve_tensor(item).detach()
        if target.size() != rows.size():
            raise ValueError("another shape than what it is loaded into")
        target.copy_(rows)
        planner.commit_tensor(item, target)


def reason_of(error: BaseException) -> str:
    """An error in one line.

    torch's CheckpointException, which is not an Exception, holds the errors of several ranks: the first one counts.
    """
    while isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
