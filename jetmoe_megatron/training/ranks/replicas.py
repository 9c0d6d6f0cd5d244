"""Do the ranks still hold equal copies? (`debug.check_sync`)"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.utils import unwrap_model
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp

from jetmoe_megatron.model.initial_weights import global_named_parameters
from jetmoe_megatron.runtime.device import device


def check_ranks_agree(model: list[DistributedDataParallel]) -> None:
    """Compare bit by bit what several ranks hold copies of: weights, the tied embedding on both ends, random states.

    All ranks call it.

    Raises:
        RuntimeError: names the first copy that differs and the ranks that were compared.
    """
    for where, group, copies in _copies(unwrap_model(model)):
        if group.size() == 1 or not copies:
            continue
        sums = torch.stack([_fingerprint(tensor) for tensor in copies.values()])
        low, high = sums.clone(), sums.clone()
        torch.distributed.all_reduce(low, ReduceOp.MIN, group=group)
        torch.distributed.all_reduce(high, ReduceOp.MAX, group=group)
        for name, differs in zip(copies, (low != high).tolist(), strict=True):
            if differs:
                raise RuntimeError(f"{name} is not the same on all {group.size()} {where} ranks")


def _copies(chunks: list[GPTModel]) -> Iterator[tuple[str, ProcessGroup, dict[str, Tensor]]]:
    """(name of a group, the group, what its ranks hold copies of)"""
    named = dict(pair for chunk in chunks for pair in global_named_parameters(chunk))
    expert = {name: p for name, p in named.items() if not getattr(p, "allreduce", True)}
    dense = {name: p for name, p in named.items() if name not in expert}
    whole = {name: p for name, p in dense.items() if not getattr(p, "tensor_model_parallel", False)}
    states = get_cuda_rng_tracker().get_states()
    random = {f"random state {name!r}": state.to(device()) for name, state in states.items()}  # a GPU's are on the host
    expert |= {name: random.pop(name) for name in list(random) if get_expert_parallel_rng_tracker_name() in name}
    data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
    yield "data-parallel", data_parallel, {**dense, **random}
    yield "expert-data-parallel", parallel_state.get_expert_data_parallel_group(), expert
    yield "tensor-parallel", parallel_state.get_tensor_model_parallel_group(), whole
    if parallel_state.is_rank_in_embedding_group(ignore_virtual=True):
        tied = {name: p for name, p in dense.items() if name == "embedding.word_embeddings.weight"}
        yield "embedding (first and last pipeline stage)", parallel_state.get_embedding_group(), tied


def _fingerprint(tensor: Tensor) -> Tensor:
    """The bits of the values as integers, summed with weights for row and column, modulo 2**64. Equal tensors have
    equal sums; the same values in another order have another sum."""
    bits = {4: torch.int32, 2: torch.int16, 1: torch.uint8}[tensor.element_size()]
    matrix = tensor.detach().view(bits).view(len(tensor), -1)
    by_row, by_column = matrix.sum(1, dtype=torch.int64), matrix.sum(0, dtype=torch.int64)
    return (by_row * _odd(by_row)).sum() + (by_column * _odd(by_column)).sum()


def _odd(like: Tensor) -> Tensor:
    return 2 * torch.arange(len(like), device=like.device) + 1
