"""A deadline for work that all ranks do together, also where torch has none: while NCCL makes a communicator, it waits
without end for a rank that does not come.

Each rank notes in the rendezvous store where it is. At the deadline, the ranks that are furthest behind are named.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.distributed import PrefixStore, Store

from jetmoe_megatron.runtime import failed_nodes
from jetmoe_megatron.runtime.meeting import nodes_of
from jetmoe_megatron.stopping import LOST_RANKS_ANSWER, STORE_ANSWERS, ExitStatus


@contextlib.contextmanager
def roll_call(work: str, places: Sequence[str], minutes: float) -> Iterator[Callable[[str], None]]:
    """Yields a function with which this rank says at which of the places it is; it must come to each of them.

    Args:
        work: what the ranks do, for the message.
        places: in the order in which all ranks come to them.
        minutes: after which the process ends with status 4, after naming the ranks that are behind.
    """
    default: Any = torch.distributed.distributed_c10d._get_default_store()  # torch's stubs have no `clone`
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # The deadline has a connection of its own: the main thread holds the other while it waits in the store.
    store, others = PrefixStore(work, default), PrefixStore(work, default.clone())
    deadline = threading.Timer(minutes * 60, _end, [work, places, minutes, others, world])
    deadline.daemon = True
    deadline.start()
    try:
        yield lambda place: store.set(str(rank), str(places.index(place)))
        store.set(str(rank), str(len(places)))
    finally:
        deadline.cancel()


def _end(work: str, places: Sequence[str], minutes: float, store: Store, world: int) -> None:
    gave_up = threading.Timer(STORE_ANSWERS, os._exit, [ExitStatus.LOST_RANKS])
    gave_up.daemon = True
    gave_up.start()
    with contextlib.suppress(torch.distributed.DistError):  # another rank held the store, has named the rank and ended
        if store.add("told", 1) == 1:
            behind = _furthest_behind(store, world, places)
            print(f"error: {work} took longer than {minutes:g} minutes: {behind}", file=sys.stderr, flush=True)
        if torch.distributed.get_rank() == 0:  # the store may end with this process
            threading.Event().wait(LOST_RANKS_ANSWER)
    os._exit(ExitStatus.LOST_RANKS)


def _furthest_behind(store: Store, world: int, places: Sequence[str]) -> str:
    at = [int(store.get(str(rank))) if store.check([str(rank)]) else -1 for rank in range(world)]
    first = min(at)
    behind = [rank for rank in range(world) if at[rank] == first]
    ranks = ", ".join(map(str, behind))
    if first == len(places):  # the last ones have come in this moment
        return f"rank {ranks} of {world} came too late"
    who = f"rank {ranks} of {world} " + ("did not come" if first < 0 else f"did not get past: {places[first]}")
    if len(nodes := nodes_of(behind)) == 1:
        failed_nodes.record(nodes[0], who)
    return who
