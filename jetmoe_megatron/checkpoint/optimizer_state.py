"""The optimizer's state in the shape of the model's parameters, whatever optimizer and layout hold it.

Megatron's own optimizer state names its parts by the layout: a state saved with expert parallelism, or by the
distributed optimizer, does not load without. Here each parameter has up to three fp32 tensors,
`optimizer.<kind>.<parameter>`, cut as the parameter is, and all share one count of steps; so what loads the model in
another layout loads these too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"  # the fp32 weight of a parameter that is not fp32 itself
State = dict[Tensor, dict[str, Tensor]]  # of each parameter


def sharded(state: State, model_state: dict[str, Any]) -> dict[str, Any]:
    """The tensors as Megatron's ShardedTensors, cut like their parameters in `model_state`."""
    entries: dict[str, Any] = {}
    for place, parameter in enumerate(nested_values(model_state)):
        for kind, tensor in state.get(getattr(parameter, "data", None), {}).items():
            entries[f"{place}.{kind}"] = make_sharded_optimizer_tensor(parameter, tensor, prefix=f"optimizer.{kind}")
    return entries


def unsharded(loaded: dict[str, Tensor], parameters: list[Tensor]) -> State:
    """What was loaded in the place of `sharded`; `parameters` are those of `model_state` in its order."""
    state: State = {}
    for name, tensor in loaded.items():
        place, kind = name.split(".")
        state.setdefault(parameters[int(place)], {})[kind] = tensor
    return state


def empty_state(optimizer: MegatronOptimizer) -> State:
    """Where a checkpoint's tensors can be loaded to."""
    return {
        parameter: {kind: torch.empty(parameter.shape, dtype=torch.float32) for kind in _kinds(parameter)}
        for part in _parts(optimizer)
        for parameter in _parameters(part)
    }


def gather_state(optimizer: MegatronOptimizer) -> State:
    """Whole tensors of each parameter of this rank. All ranks call it: the distributed optimizer's are put together."""
    state: State = {}
    for part in _parts(optimizer):
        _allocate(part)
        if isinstance(part, DistributedOptimizer):
            state |= dict(_gathered(part))
        else:
            for parameter, main in _mains(part):
                own = part.optimizer.state[main]
                state[parameter] = {kind: main if kind == MASTER else own[kind] for kind in _kinds(parameter)}
    return state


def steps_done(optimizer: MegatronOptimizer) -> int:
    part = _parts(optimizer)[0]
    group = next(group for group in part.optimizer.param_groups if group["params"])
    if isinstance(part.optimizer, torch.optim.AdamW):
        return int(part.optimizer.state[group["params"][0]]["step"])
    return int(group.get("step", 0))  # where Transformer Engine and Apex keep it


@torch.no_grad()
def set_state(optimizer: MegatronOptimizer, state: State, steps: int) -> None:
    """Take this rank's share of whole tensors. The model's parameters must have been loaded before."""
    for part in _parts(optimizer):
        _allocate(part)
        for group in part.optimizer.param_groups:
            if not isinstance(part.optimizer, torch.optim.AdamW):
                group["step"] = steps
        if isinstance(part, DistributedOptimizer):
            for parameter, place in _own_ranges(part):
                whole = {"param": state[parameter].get(MASTER, parameter.data), **state[parameter]}
                tensors = {kind: tensor.flatten()[place] for kind, tensor in whole.items() if kind != MASTER}
                part._set_main_param_and_optimizer_states(parameter, {**tensors, "step": torch.tensor(float(steps))})
        else:
            for parameter, main in _mains(part):
                own = part.optimizer.state[main]
                if MASTER in state[parameter]:
                    main.data.copy_(state[parameter][MASTER])
                for kind in MOMENTS:
                    own[kind].copy_(state[parameter][kind])
                if "step" in own:
                    own["step"].fill_(steps)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """One optimizer for the dense and one for the experts' parameters, where these have other data-parallel groups."""
    return [part for part in optimizer.chained_optimizers if any(g["params"] for g in part.optimizer.param_groups)]


def _kinds(parameter: Tensor) -> tuple[str, ...]:
    return MOMENTS if parameter.dtype == torch.float32 else (*MOMENTS, MASTER)


def _parameters(part: Any) -> Iterator[Tensor]:
    if isinstance(part, DistributedOptimizer):
        for buffer in part.buffers:
            yield from buffer.param_index_map
    else:
        yield from (parameter for parameter, _ in _mains(part))


def _mains(part: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter, the tensor that the optimizer steps on)"""
    if isinstance(part, Float16OptimizerWithFloat16Params):
        for parameters, mains in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            yield from zip(parameters, mains, strict=True)
        own = [p for group in part.fp32_from_fp32_groups for p in group]
    else:
        own = [p for group in part.optimizer.param_groups for p in group["params"]]
    yield from zip(own, own, strict=True)


def _allocate(part: Any) -> None:
    """Optimizers make their state at their first step; a checkpoint may come before."""
    if part.optimizer.state:
        return
    if isinstance(part, DistributedOptimizer):
        part.load_state_dict(part.state_dict())
        for own in part.optimizer.state.values():  # it allocates memory and leaves it as it is
            for kind in MOMENTS:
                own[kind].zero_()
    else:
        part.init_state_fn(part.optimizer, part.config)


def _gathered(part: DistributedOptimizer) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    world = part.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
    for number, buffer in enumerate(part.buffers):
        (tensors,) = world[number].values()
        for parameter, (start, end, _) in buffer.param_index_map.items():
            flat = {**{kind: tensors[kind] for kind in MOMENTS}, MASTER: tensors["param"]}
            yield parameter, {kind: flat[kind][start:end].view(parameter.shape) for kind in _kinds(parameter)}


def _own_ranges(part: DistributedOptimizer) -> Iterator[tuple[Tensor, slice]]:
    """Each parameter that this rank has a part of, and where that lies in the flat parameter."""
    for ranges in part.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                for parameter, own in bucket["param_map"].items():
                    yield parameter, slice(own["param"].start, own["param"].end)
