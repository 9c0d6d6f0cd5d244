"""What ranks do on their process groups, and whether they do the same."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby, zip_longest
from typing import NamedTuple


class Event(NamedTuple):
    """A call on a process group. Sizes are numbers of elements, ranks those of the world."""

    group: str
    members: tuple[int, ...]
    kind: str
    what: str  # sizes and dtypes, the root
    place: str  # who called
    sent: tuple[int, ...] = ()  # to each member, if that is not the same on all
    received: tuple[int, ...] = ()  # from each member
    peer: int | None = None  # of `send` and `recv`

    def __str__(self) -> str:
        to = "" if self.peer is None else f" {'to' if self.kind == 'send' else 'from'} rank {self.peer}"
        splits = f", to each {list(self.sent)}, from each {list(self.received)}" if self.sent else ""
        return f"{self.kind}{to} of {self.what}{splits} ({self.place})"


class _Queue(NamedTuple):
    """Calls that must come in one order: the collectives of a group, or the messages from one rank to another."""

    group: str
    ranks: tuple[int, ...]
    is_of_messages: bool

    def __str__(self) -> str:
        if self.is_of_messages:
            return f"group {self.group}, message from rank {self.ranks[0]} to rank {self.ranks[1]}"
        return f"group {self.group} of ranks {list(self.ranks)}, collective"


_Placed = tuple[int, Event]  # with its place in the rank's trace


class _Difference(NamedTuple):
    """In the order of importance."""

    has_only_ended: bool  # a rank makes no more calls, and the others do the same
    place: int  # in the trace of the rank that comes to it first
    description: str


def first_difference(traces: dict[int, list[Event]]) -> str | None:
    """Where the ranks first do not do the same, and what each does there; None if they always do."""
    queues: dict[_Queue, dict[int, list[_Placed]]] = defaultdict(lambda: defaultdict(list))
    for rank, events in traces.items():
        for place, event in enumerate(events):
            queues[_queue_of(rank, event)][rank].append((place, event))
    found = [difference for queue, calls in queues.items() if (difference := _difference(queue, calls))]
    return min(found).description if found else None


def _queue_of(rank: int, event: Event) -> _Queue:
    if event.peer is None:
        return _Queue(event.group, event.members, False)
    return _Queue(event.group, (rank, event.peer) if event.kind == "send" else (event.peer, rank), True)


def _difference(queue: _Queue, calls: dict[int, list[_Placed]]) -> _Difference | None:
    """calls: those of each rank in this queue."""
    for number, column in enumerate(zip_longest(*(calls[rank] for rank in queue.ranks)), 1):
        present = [entry for entry in column if entry]
        events = [event for _, event in present]
        if len(present) == len(column) and _fit(events):
            continue
        does = {
            rank: str(entry[1]) if entry else "nothing more" for rank, entry in zip(queue.ranks, column, strict=True)
        }
        lines = [f"{queue} {number}:"]
        for what, ranks in groupby(sorted(does, key=does.__getitem__), key=does.__getitem__):
            same = list(map(str, ranks))
            lines.append(f"  {'rank' if len(same) == 1 else 'ranks'} {', '.join(same)}: {what}")
        return _Difference(_fit(events), min(place for place, _ in present), "\n".join(lines))
    return None


def _fit(events: list[Event]) -> bool:
    """Whether these are the same call on each rank. Parts of uneven sizes are compared if all ranks are there."""
    if len({(event.what, event.kind if event.peer is None else "message") for event in events}) > 1:
        return False
    members = range(len(events[0].sent))
    if len(events) < len(members):
        return True
    return all(events[i].sent[j] == events[j].received[i] for i in members for j in members)
