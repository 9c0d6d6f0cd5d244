"""The optimizer's state in the shapes of the model's parameters, for any optimizer and layout.

Megatron's own optimizer state names its parts by the layout: a state that was saved with expert parallelism, or by the
distributed optimizer, does not load without it. Here each parameter has up to three fp32 tensors,
`optimizer.<kind>.<parameter>`, divided like the parameter, and all share one step count. So these tensors load in
another layout just as the model does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor
from torch.distributed import ProcessGroup

MOMENTS = ("exp_avg", "exp_avg_sq")
_GATHERED_AT_ONCE = 2**26  # numbers
MASTER = "master"  # the fp32 weight of a parameter that is not fp32 itself
State = dict[Tensor, dict[str, Tensor]]  # of each parameter


def sharded(state: State, model_state: dict[str, Any]) -> dict[str, Any]:
    """The tensors as Megatron's ShardedTensors, cut like their parameters in `model_state`."""
    entries: dict[str, Any] = {}
    for place, parameter in enumerate(nested_values(model_state)):
        data: Any = getattr(parameter, "data", None)
        for kind, tensor in state.get(data, {}).items():
            entries[f"{place}.{kind}"] = make_sharded_optimizer_tensor(parameter, tensor, prefix=f"optimizer.{kind}")
    return entries


def own_state(optimizer: MegatronOptimizer) -> State:
    """The state of this rank's parameters. What the distributed optimizer holds in parts has no data: see `gather`."""
    state: State = {}
    for part in _parts(optimizer):
        _allocate(part)
        if isinstance(part, DistributedOptimizer):
            for parameter in (p for buffer in part.buffers for p in buffer.param_index_map):
                state[parameter] = {
                    kind: torch.empty(parameter.shape, dtype=torch.float32, device="meta") for kind in kinds(parameter)
                }
        else:
            for parameter, main in main_weights(part):
                own = part.optimizer.state[main]
                state[parameter] = {kind: main if kind == MASTER else own[kind] for kind in kinds(parameter)}
    return state


def gather(optimizer: MegatronOptimizer, state: State, entries: Iterable[ShardedTensor]) -> None:
    """Fill those of `entries` that this rank will write and that have no data. All ranks call it.

    The parts of all data-parallel ranks are exchanged in blocks, and no rank keeps more than what it writes.

    Args:
        state: from `own_state`.
        entries: from `sharded`, after it was decided which rank writes what.
    """
    written = {id(entry.data): entry for entry in entries if entry.data.is_meta and is_main_replica(entry.replica_id)}
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            for buffer, ranges in zip(part.buffers, part.gbuf_ranges, strict=True):
                for bucket, own in zip(buffer.buckets, *ranges.values(), strict=True):
                    for kind in kinds(bucket.params_list[0]):
                        targets = []  # (where it begins in the bucket, the flat tensor to fill)
                        for parameter in bucket.params_list:
                            if entry := written.get(id(state[parameter][kind])):
                                entry.data = torch.empty(parameter.shape, dtype=torch.float32)
                                start = buffer.param_index_map[parameter][0] - bucket.offset
                                targets.append((start, entry.data.view(-1)))
                        _gather_bucket(part, bucket, own["param_map"], kind, targets)


def steps_done(optimizer: MegatronOptimizer) -> int:
    part = _parts(optimizer)[0]
    group = next(group for group in part.optimizer.param_groups if group["params"])
    if isinstance(part.optimizer, torch.optim.AdamW):
        return int(part.optimizer.state[group["params"][0]]["step"])
    return int(group.get("step", 0))


@dataclass(frozen=True)
class OwnNumbers:
    """What this rank holds of one kind of state of a parameter, to be filled in place."""

    parameter: Tensor
    kind: str
    numbers_N: Tensor  # flat
    first: int  # where `numbers_N` begins in the flattened parameter
    group: ProcessGroup | None  # of the ranks that hold the same numbers; None: only this rank


def own_numbers(optimizer: MegatronOptimizer) -> Iterator[OwnNumbers]:
    """All that this rank holds of the state. fp32 parameters are not in it: they belong to the model."""
    for part in _parts(optimizer):
        _allocate(part)
        if isinstance(part, DistributedOptimizer):
            for parameter, first in _own_ranges(part):
                tensors = part._get_main_param_and_optimizer_states(parameter)
                for kind in kinds(parameter):
                    numbers_N = tensors["param" if kind == MASTER else kind].detach().view(-1)
                    yield OwnNumbers(parameter, kind, numbers_N, first, None)
        else:
            for parameter, main in main_weights(part):
                own = part.optimizer.state[main]
                for kind in kinds(parameter):
                    numbers_N = (main if kind == MASTER else own[kind]).detach().view(-1)
                    yield OwnNumbers(parameter, kind, numbers_N, 0, replicas(parameter))


def replicas(parameter: Tensor) -> ProcessGroup:
    """The ranks that hold the same part of the model: Megatron's DDP reduces the parameter's gradient over them."""
    if getattr(parameter, "allreduce", True):
        return parallel_state.get_data_parallel_group(with_context_parallel=True)
    return parallel_state.get_expert_data_parallel_group()


def set_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """Set the number of steps that are done. `own_numbers` must have been called before."""
    for part in _parts(optimizer):
        if not isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["step"] = steps  # where Transformer Engine and Apex keep it
        for own in part.optimizer.state.values():
            if "step" in own:
                own["step"].fill_(steps)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """One optimizer for the dense and one for the experts' parameters, if these have different data-parallel groups."""
    return [part for part in optimizer.chained_optimizers if any(g["params"] for g in part.optimizer.param_groups)]


def kinds(parameter: Tensor) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MASTER)


def main_weights(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter, the tensor that the optimizer steps on), which the distributed optimizer has of a part of it."""
    if isinstance(part, DistributedOptimizer):
        for parameter, (group, place) in part.model_param_group_index_map.items():
            yield parameter, part.optimizer.param_groups[group]["params"][place]
        return
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for parameters, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(parameters, mains, strict=True)
        own = [p for group in part.fp32_from_fp32_groups for p in group]
    else:
        own = [p for group in part.optimizer.param_groups for p in group["params"]]
    yield from zip(own, own, strict=True)


def _allocate(part: Any) -> None:
    """Create the state, which optimizers create at their first step: a checkpoint may come before that."""
    if part.optimizer.state:
        return
    if isinstance(part, DistributedOptimizer):
        part.load_state_dict(part.state_dict())
        for own in part.optimizer.state.values():  # load_state_dict allocates memory without clearing it
            for kind in MOMENTS:
                own[kind].zero_()
    else:
        part.init_state_fn(part.optimizer, part.config)


@torch.no_grad()
def _gather_bucket(
    part: Any, bucket: Any, own: dict[Tensor, Any], kind: str, targets: list[tuple[int, Tensor]]
) -> None:
    """Fill `targets` from the equal shares that the data-parallel ranks have of one bucket."""
    group = part.data_parallel_group
    share = bucket.grad_data.numel() // group.size()
    local = torch.zeros(share, dtype=torch.float32, device=bucket.grad_data.device)
    for parameter, place in own.items():
        value = part._get_main_param_and_optimizer_states(parameter)["param" if kind == MASTER else kind]
        local[place["gbuf_local"].start : place["gbuf_local"].end] = value.flatten()
    block = max(1, _GATHERED_AT_ONCE // group.size())
    for first in range(0, share, block):
        piece = local[first : first + block]
        shares = torch.empty(group.size() * len(piece), dtype=torch.float32, device=piece.device)
        torch.distributed.all_gather_into_tensor(shares, piece, group=group)
        for rank, values in enumerate(shares.split(len(piece))):
            begins = rank * share + first
            for start, target in targets:
                low, high = max(start, begins), min(start + len(target), begins + len(values))
                if low < high:
                    target[low - start : high - start] = values[low - begins : high - begins]


def _own_ranges(part: DistributedOptimizer) -> Iterator[tuple[Tensor, int]]:
    """Each parameter that this rank has a part of, and where that begins in the flat parameter."""
    for ranges in part.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, own in bucket["param_map"].items():
                    yield parameter, own["param"].start
