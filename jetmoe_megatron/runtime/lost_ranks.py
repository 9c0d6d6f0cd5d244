"""Names the rank that died or hangs."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
import traceback
from typing import NoReturn

import torch

from data_tools.progress import above
from jetmoe_megatron.runtime import failed_nodes
from jetmoe_megatron.runtime.failed_nodes import this_node
from jetmoe_megatron.runtime.meeting import nodes_of
from jetmoe_megatron.stopping import LOST_RANKS_ANSWER, STORE_ANSWERS, ExitStatus


def is_lost_connection(error: RuntimeError) -> bool:
    """gloo gives up with a plain RuntimeError that names one of gloo's source files."""
    return isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)


def name_lost_ranks(error: RuntimeError) -> NoReturn:
    """Leave the process group and exit with status 4. One rank prints a line on stderr.

    A rank that gives up says so in the rendezvous store and closes its connections, so that the ranks that wait for it
    give up too. A rank that has not said so within a few seconds died or hangs.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from a launcher that has noticed too
    gave_up = threading.Timer(STORE_ANSWERS, _leave, [error])  # the store may be on the other side of a cut network
    gave_up.daemon = True
    gave_up.start()
    store = torch.distributed.distributed_c10d._get_default_store()
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    try:
        store.set(f"gave up/{rank}", "")
        traceback.clear_frames(error.__traceback__)  # a group that they hold would keep its connections
        torch.distributed.destroy_process_group()
        time.sleep(LOST_RANKS_ANSWER)
        lost = [other for other in range(world) if not store.check([f"gave up/{other}"])]
        is_first = store.add("told", 1) == 1
        who = _did_not_answer(lost, world, is_first) if lost else "the ranks lost one another"
    except torch.distributed.DistError:  # the store was on the rank, or on the node, that is gone
        is_first, who = True, f"rank {rank} lost the others, and the rendezvous too"
    gave_up.cancel()
    if is_first:
        _say(who, error)
    raise SystemExit(ExitStatus.LOST_RANKS) from None


def _did_not_answer(lost: list[int], world: int, is_first: bool) -> str:
    nodes, all_nodes = nodes_of(lost), nodes_of(range(world))
    where = f" (on {', '.join(nodes)})" if len(all_nodes) > 1 else ""
    who = f"rank {', '.join(map(str, lost))} of {world}{where} did not answer"
    if is_first and len(nodes) == 1:  # of many, it is not clear which is to blame
        failed_nodes.record(nodes[0], who)
    return who


def _leave(error: RuntimeError) -> NoReturn:
    _say(f"{this_node()} lost the other nodes, and the rendezvous too", error)
    os._exit(ExitStatus.LOST_RANKS)


def _say(who: str, error: RuntimeError) -> None:
    reason = re.sub(r"^\[\S+\] ", "", str(error).splitlines()[0]).split(". ")[0]
    above(f"error: {who}: {reason}", sys.stderr)
