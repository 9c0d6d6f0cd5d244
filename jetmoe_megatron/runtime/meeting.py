"""The ranks meet in the rendezvous store before they join a process group, where a difference would be a hang.

Each rank says what it runs on. Rank 0 compares and writes the verdict, for which all wait. A rank that was refused
before the meeting writes the verdict itself, so that nobody waits for it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed import PrefixStore, Store, TCPStore

from jetmoe_megatron.errors import ElsewhereError, SharedError, printable
from jetmoe_megatron.runtime.failed_nodes import this_node
from jetmoe_megatron.runtime.machine import Machine, first_difference, this_machine
from jetmoe_megatron.stopping import LAUNCHER_FOLDER, NODES_OF_RANKS, REFUSAL_IS_TOLD, STORE_ANSWERS, ExitStatus

_ALIKE, _DIFFERENT, _REFUSED, _FAULT, _LOST = "alike", "different", "refused", "fault", "lost"
_nodes: list[str] = []  # of each rank, after the meeting

# What may not be different: from (host, what it runs on) of each rank to a line, or None if all is well.
Judge = Callable[[Sequence[tuple[str, Machine]]], str | None]


class DifferentRanks(SharedError):
    """The ranks run on different things."""


def meet(timeout_minutes: float, judge: Judge = first_difference, own: Machine | None = None) -> tuple[Store, int, int]:
    """Returns the store, this rank and the number of ranks, for init_process_group.

    Args:
        judge: called on rank 0.
        own: what this rank runs on; default: what `this_machine` finds.

    Raises:
        DifferentRanks: on all ranks, with the line of the judge.
        SharedError: on all ranks: one of them was refused. ElsewhereError: for a reason that may pass.
        SystemExit: with status 4, after a line on stderr: a rank did not come in time.
    """
    limit = timedelta(minutes=timeout_minutes)
    try:
        store, rank, world = _store(limit), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        meeting = _meeting_in(store)
        meeting.set(str(rank), json.dumps([this_node(), asdict(own or this_machine())]))
        if rank == 0:
            _write(meeting, *_verdict(meeting, world, limit, judge))
        meeting.wait(["verdict"], limit + timedelta(seconds=STORE_ANSWERS))
        verdict, message = json.loads(meeting.get("verdict"))
        meeting.add("heard", 1)
        if verdict != _ALIKE and _holds_store():
            _wait_until_heard(meeting, _number_here(meeting, world) if verdict == _LOST else world)
    except torch.distributed.DistError as error:
        reason = printable(str(error).splitlines()[0])
        _leave(f"{this_node()} did not meet rank 0 at {_endpoint()} in {timeout_minutes:g} minutes: {reason}")
    if verdict == _DIFFERENT:
        raise DifferentRanks(message)
    if verdict == _REFUSED:
        raise SharedError(message)
    if verdict == _FAULT:
        raise ElsewhereError(message, passes=True)
    if verdict == _LOST:
        _leave(message if rank == 0 else None)
    _nodes[:] = json.loads(message)
    if rank == 0 and (launcher := os.environ.get(LAUNCHER_FOLDER)):
        with suppress(OSError):
            (Path(launcher) / NODES_OF_RANKS).write_text(message)
    return store, rank, world


def wait_until_all_know(store: Store, world: int) -> None:
    """For ranks that end after `meet`: the store may end with rank 0, before the others have read the verdict."""
    if _holds_store():
        _wait_until_heard(_meeting_in(store), world)


def nodes_of(ranks: Sequence[int]) -> list[str]:
    """Where the ranks are, each node once. Empty before the ranks have met."""
    return list(dict.fromkeys(_nodes[rank] for rank in ranks if rank < len(_nodes)))


def refuse(message: str, passes: bool) -> None:
    """Tell the ranks that wait in `meet`, or will, that this one was refused, if the store can be reached.

    passes: whether the reason may pass.
    """
    if _holds_store():
        return  # which ends with this process
    with suppress(torch.distributed.DistError):
        meeting = _meeting_in(_store(timedelta(seconds=REFUSAL_IS_TOLD)))
        _write(meeting, _FAULT if passes else _REFUSED, f"rank {os.environ['RANK']} on {this_node()}: {message}")
        meeting.add("heard", 1)


def _verdict(meeting: Store, world: int, limit: timedelta, judge: Judge) -> tuple[str, str]:
    keys, deadline = [str(rank) for rank in range(world)], time.monotonic() + limit.total_seconds()
    while not meeting.check(keys) and not meeting.check(["verdict"]):
        if time.monotonic() > deadline:
            late = [key for key in keys if not meeting.check([key])]
            return _LOST, f"rank {', '.join(late)} of {world} did not come in {limit.total_seconds() / 60:g} minutes"
        time.sleep(0.02)
    if meeting.check(["verdict"]):
        return _REFUSED, ""  # the one that is there counts
    said = [json.loads(meeting.get(key)) for key in keys]
    difference = judge([(host, Machine(**machine)) for host, machine in said])
    return (_DIFFERENT, difference) if difference else (_ALIKE, json.dumps([host for host, _ in said]))


def _number_here(meeting: Store, world: int) -> int:
    return sum(meeting.check([str(rank)]) for rank in range(world))


def _wait_until_heard(meeting: Store, ranks: int) -> None:
    """Before the store ends with this process."""
    deadline = time.monotonic() + STORE_ANSWERS
    while meeting.add("heard", 0) < ranks and time.monotonic() < deadline:
        time.sleep(0.02)


def _store(limit: timedelta) -> Store:
    """As rendezvous("env://") has it (rendezvous.py, `_create_c10d_store`), but rank 0 does not wait for the others.

    A launcher that starts its workers again keeps the store: they must not find the addresses of those before.
    """
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        int(os.environ["WORLD_SIZE"]),
        _holds_store(),
        limit,
        wait_for_workers=False,
        multi_tenant=True,
    )
    return PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _holds_store() -> bool:
    """Whether the rendezvous store is in this process, not in a launcher."""
    return os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)


def _meeting_in(store: Store) -> Store:
    return PrefixStore("meeting", store)


def _write(meeting: Store, verdict: str, message: str) -> None:
    """The first verdict stays."""
    meeting.compare_set("verdict", "", json.dumps([verdict, message]))


def _endpoint() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _leave(message: str | None) -> NoReturn:
    if message:
        print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(ExitStatus.LOST_RANKS) from None
