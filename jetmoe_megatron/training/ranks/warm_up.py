"""Each group of ranks that training uses exchanges a number before anything is built.

NCCL makes a communicator at the first use of a group. That would be in the first step, when memory is full, and a rank
that does not take part would be noticed late.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch.distributed import ProcessGroup

from jetmoe_megatron.config.layout import Layout
from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model.config import JetMoEConfig, transformer_config
from jetmoe_megatron.runtime.device import device
from jetmoe_megatron.runtime.roll_call import roll_call
from jetmoe_megatron.training.optimizer import is_distributed


def warm_up_groups(run: Run, layout: Layout) -> float:
    """All ranks call it. Returns the seconds that it took.

    Raises:
        SystemExit: over gloo with status 4, as `process_group`. A group that takes longer than
            `parallel.timeout_minutes` ends the process with status 4 after the ranks that are behind were named.
    """
    started = time.perf_counter()
    exchanges = _exchanges(run, layout)
    with roll_call("warming up the groups", list(exchanges), run.parallel.timeout_minutes) as arrive:
        for name, exchange in exchanges.items():
            arrive(name)
            exchange()
    return time.perf_counter() - started


def _exchanges(run: Run, layout: Layout) -> dict[str, Callable[[], None]]:
    """The same order on all ranks, so that none waits for one that waits for it."""
    groups = {name: group for name, group in groups_of(run).items() if group is None or group.size() > 1}
    exchanges: dict[str, Callable[[], None]] = {name: partial(_sum, group) for name, group in groups.items()}
    if layout.expert > 1:
        exchanges["exchange of experts' rows"] = _exchange_rows
    if layout.pipeline > 1:
        exchanges["transfer between stages"] = partial(_transfer, transformer_config(run, layout))
    return exchanges


def groups_of(run: Run) -> dict[str, ProcessGroup | None]:
    """What training reduces or gathers over. None: this rank is not in that group.

    tests/training/ranks/test_warm_up.py compares it with what training uses.
    """
    get = parallel_state
    groups = {
        "all ranks": torch.distributed.group.WORLD,
        "data parallel": get.get_data_parallel_group(with_context_parallel=True),
        "tensor": get.get_tensor_model_parallel_group(),
        "tensor and context": get.get_tensor_and_context_parallel_group(),
        "context": get.get_context_parallel_group(),
        "pipeline": get.get_pipeline_model_parallel_group(),
        "first and last stage": get.get_embedding_group(check_initialized=False),
        "expert": get.get_expert_model_parallel_group(),
        "expert tensor": get.get_expert_tensor_parallel_group(),
        "expert and expert tensor": get.get_expert_tensor_and_model_parallel_group(),
        "expert data parallel": get.get_expert_data_parallel_group(),
    }
    # The gradient norm (optimizer.py and distrib_optimizer.py, `get_grad_stats_parallel_group`).
    if is_distributed(run):
        groups["optimizer"] = get.get_intra_distributed_optimizer_instance_group()
    else:
        groups["model"] = get.get_model_parallel_group()
        groups["expert model"] = get.get_expert_tensor_model_pipeline_parallel_group()
    return groups


def _sum(group: ProcessGroup | None) -> None:
    if group is not None:
        ones = torch.ones(1, device=device())
        torch.distributed.all_reduce(ones, group=group)
        ones.item()  # wait for it, on a GPU too


def _exchange_rows() -> None:
    group = parallel_state.get_expert_model_parallel_group()
    rows = torch.ones(group.size(), device=device())
    torch.distributed.all_to_all_single(torch.empty_like(rows), rows, group=group)
    rows.sum().item()


def _transfer(config: JetMoEConfig) -> None:
    """To each neighbour and back, with the calls of the schedules: unbatched transfers have a communicator per pair."""
    neighbours = P2PCommunicator(parallel_state.get_pipeline_model_parallel_group(), config)
    shape = (1, 1, 1)
    one = torch.ones(shape, device=device(), dtype=config.pipeline_dtype)
    if config.virtual_pipeline_model_parallel_size is not None:  # in a ring
        neighbours.send_forward_recv_forward(one, recv_prev=True, tensor_shape=shape)
        neighbours.send_backward_recv_backward(one, recv_next=True, tensor_shape=shape)
    else:
        is_first, is_last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        neighbours.recv_forward(shape, is_first)
        neighbours.send_forward(one, is_last)
        neighbours.recv_backward(shape, is_last)
        neighbours.send_backward(one, is_first)
    one.sum().item()
