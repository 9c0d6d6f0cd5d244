"""Fill model and optimizer from a checkpoint: one of a training run, or one made from a Hugging Face model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from data_tools.printing import printable
from data_tools.progress import OnProgress, progress
from jetmoe_megatron.checkpoint.common_state import COMMON, read_optimizer_steps
from jetmoe_megatron.checkpoint.model_state import sharded_model
from jetmoe_megatron.checkpoint.optimizer_state import own_numbers, replicas, set_steps
from jetmoe_megatron.checkpoint.read_together import Wanted, fill
from jetmoe_megatron.checkpoint.saved_tensors import SavedTensors
from jetmoe_megatron.errors import SharedError, UserError, may_pass


def load_checkpoint(path: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Fill model and optimizer from a checkpoint of any layout. All ranks call it.

    Raises:
        SharedError: on all ranks, if a file is not what it should be.
    """
    with _failing_together(path):
        steps = _steps(path)
        saved = SavedTensors(path)
    part_of = _parts(model)
    with _failing_together(path), _progress(path) as show:
        fill(saved, [*_weights(part_of), *_state(part_of, optimizer)], show)
    set_steps(optimizer, steps)


def load_weights(path: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Fill `model` from the checkpoint `path`, and the optimizer's own fp32 copies of it. All ranks call it.

    The optimizer's moments stay as they are. Tensors are cast to the model's precision.

    Raises:
        SharedError: as `load_checkpoint`.
    """
    with _failing_together(path):
        read_optimizer_steps(path)
        saved = SavedTensors(path)
    with _failing_together(path), _progress(path) as show:
        fill(saved, [*_weights(_parts(model))], show)
    optimizer.reload_model_params()


def check_can_load(path: Path, shapes: Mapping[str, Sequence[int]], weights_only: bool) -> None:
    """What `load_checkpoint`, or `load_weights`, would find wrong, without a model and without reading its numbers.

    Args:
        shapes: of all tensors that they would look for.

    Raises:
        UserError: a file is not what it should be.
    """
    try:
        read_optimizer_steps(path) if weights_only else _steps(path)
        saved = SavedTensors(path)
        for name, shape in shapes.items():
            saved.check(name, shape)
    except (OSError, ValueError) as error:
        raise UserError(_refusal(path, error)) from error


def _steps(path: Path) -> int:
    steps = read_optimizer_steps(path)
    if steps is None:
        raise ValueError(f"its {COMMON} has no number of optimizer steps")
    return steps


def _refusal(path: Path, error: OSError | ValueError) -> str:
    reason = f"{Path(error.filename or path).name}: {error.strerror}" if isinstance(error, OSError) else str(error)
    return printable(f"{path}: cannot be loaded: {reason}")


def _parts(model: list[DistributedDataParallel]) -> dict[Tensor, ShardedTensor]:
    """What each parameter is in a checkpoint."""
    part_of = {entry.data: entry for entry in nested_values(sharded_model(model)) if isinstance(entry, ShardedTensor)}
    assert all(parameter in part_of for chunk in model for parameter in chunk.parameters())
    return part_of


def _weights(part_of: dict[Tensor, ShardedTensor]) -> Iterator[Wanted]:
    for parameter, part in part_of.items():
        yield Wanted(part, parameter.detach().view(-1), 0, replicas(parameter))


def _state(part_of: dict[Tensor, ShardedTensor], optimizer: MegatronOptimizer) -> Iterator[Wanted]:
    for own in own_numbers(optimizer):
        shape = torch.empty(own.parameter.shape, dtype=torch.float32, device="meta")
        part = make_sharded_optimizer_tensor(part_of[own.parameter], shape, prefix=f"optimizer.{own.kind}")
        yield Wanted(part, own.numbers_N, own.first, own.group)


def _progress(path: Path) -> AbstractContextManager[OnProgress]:
    return progress(f"loading {path.name}", here=torch.distributed.get_rank() == 0)


@contextmanager
def _failing_together(path: Path) -> Iterator[None]:
    """What fails on one rank is raised on all, so that none waits for it."""
    failed: tuple[str, bool] | None = None  # and whether it may pass
    try:
        yield
    except (OSError, ValueError) as error:
        failed = _refusal(path, error), may_pass(error)
    reasons: list[tuple[str, bool] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(reasons, failed)
    if reason := next(filter(None, reasons), None):
        raise SharedError(*reason)
