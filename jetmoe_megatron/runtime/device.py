"""The device of this rank and the process group over all ranks."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import torch

from jetmoe_megatron.runtime import cpu
from jetmoe_megatron.runtime.children import end_with_this_process, stop_with_launcher
from jetmoe_megatron.runtime.lost_ranks import is_lost_connection, name_lost_ranks
from jetmoe_megatron.runtime.machine import first_difference
from jetmoe_megatron.runtime.matmul import choose_matmul
from jetmoe_megatron.runtime.meeting import Judge, meet
from jetmoe_megatron.runtime.memory import keep_freed_memory


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where this rank computes: its own GPU, or what replaces it."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else cpu.place()


def peak_memory() -> dict[str, float]:
    """`peak_memory_gb`, the most memory that this rank's tensors have held on its GPU; empty on a CPU."""
    return {"peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9} if has_gpu() else {}


def held_memory() -> int:
    """Bytes of this rank's tensors on its GPU now; 0 on a CPU."""
    return torch.cuda.memory_allocated() if has_gpu() else 0


@contextlib.contextmanager
def process_group(timeout_minutes: float = 30, judge: Judge = first_difference) -> Iterator[None]:
    """Join the world of ranks: NCCL on GPUs, gloo through the CPU adapter elsewhere.

    Args:
        judge: says in what the ranks may not differ.

    Raises:
        SharedError: on all ranks, if one of them was refused or the judge refuses them.
        SystemExit: with status 4, after naming the ranks that did not come or, over gloo, died or did not answer.
    """
    end_with_this_process()
    stop_with_launcher()
    be_a_world_of_one()
    if has_gpu():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        cpu.install()
        keep_freed_memory()
        choose_matmul()
    store, rank, world = meet(timeout_minutes, judge)
    torch.distributed.init_process_group(
        backend="nccl" if has_gpu() else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(minutes=timeout_minutes),
    )
    try:
        yield
    except BaseException as error:
        if has_gpu():  # before showing the error, NCCL would wait for all ranks, which wait for this one
            raise
        if isinstance(error, RuntimeError) and is_lost_connection(error):
            name_lost_ranks(error)
        torch.distributed.destroy_process_group()
        raise
    torch.distributed.destroy_process_group()


def be_a_world_of_one() -> None:
    """If this process was started without a launcher."""
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port())
        )


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
