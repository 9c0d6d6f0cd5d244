"""Do the ranks still hold the same weights where they must? (`debug.check_sync`)"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from jetmoe_megatron.model.initialize import global_named_parameters


def check_weights_agree(model: list[DistributedDataParallel]) -> None:
    """Compare every weight bit by bit among the ranks that hold copies of it. All ranks call it.

    Raises:
        RuntimeError: names the first weight that differs and the ranks that were compared.
    """
    named = [pair for chunk in unwrap_model(model) for pair in global_named_parameters(chunk)]
    for where, group, holds_copies in _groups():
        copied = [(name, parameter) for name, parameter in named if holds_copies(parameter)]
        if group.size() == 1 or not copied:
            continue
        sums = torch.stack([_bit_sum(parameter) for _, parameter in copied])
        low, high = sums.clone(), sums.clone()
        torch.distributed.all_reduce(low, ReduceOp.MIN, group=group)
        torch.distributed.all_reduce(high, ReduceOp.MAX, group=group)
        for (name, _), differs in zip(copied, (low != high).tolist(), strict=True):
            if differs:
                raise RuntimeError(f"{name} is not the same on all {group.size()} {where} ranks")


def _groups() -> list:
    """(name, group, which parameters are copied within it)"""

    def is_expert(parameter: Tensor) -> bool:
        return not getattr(parameter, "allreduce", True)

    dense: ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    experts: ProcessGroup = parallel_state.get_expert_data_parallel_group()
    tensor: ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return [
        ("data-parallel", dense, lambda p: not is_expert(p)),
        ("expert-data-parallel", experts, is_expert),
        ("tensor-parallel", tensor, lambda p: not getattr(p, "tensor_model_parallel", False) and not is_expert(p)),
    ]


def _bit_sum(parameter: Tensor) -> Tensor:
    """The sum of the values' bits as integers: equal for equal tensors, in any order of summation."""
    bits = {4: torch.int32, 2: torch.int16}[parameter.element_size()]
    return parameter.detach().view(bits).sum(dtype=torch.int64)
