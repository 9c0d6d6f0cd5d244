"""Records what each rank sends and receives on its process groups, and compares the ranks.

The ranks run the real program. Each of their process groups is a `Recorder`, a process group in Python: nothing reaches
its transport without being recorded, and torch refuses what it does not define. The transport is gloo, or a `StandIn`
that computes most results without the other ranks.
"""

# The arguments of a process group's methods have other types in each version of torch.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import reduce
from itertools import groupby, zip_longest
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, ReduceOp, Store, TCPStore, distributed_c10d

import jetmoe_megatron

_LIMIT = timedelta(seconds=60)  # that a rank waits for another one
_BACKEND = "recorder"
_OURS = f"{Path(jetmoe_megatron.__file__).parent}/"
_STAND_IN = 0.01  # each number of a tensor that another rank should have sent
Transport = Callable[[Store, int, int], Any]  # of store, rank and number of ranks of a group


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


# --- recording ---


@contextmanager
def store_of_ranks() -> Iterator[int]:
    """The port of a store that outlives the ranks, which they meet in."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port


def record(folder: Path, port: int, transport: Transport, also: Callable[[], None]) -> None:
    """In a rank: from now on, its process groups write what they do to the file `folder`/RANK, which must not exist.

    also: what else to do in the rank before the program.
    """
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder.mkdir(parents=True, exist_ok=True)
    trace = os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def write(event: Event) -> None:
        os.write(trace, json.dumps(event).encode() + b"\n")

    def create(group: Any, options: Any) -> Recorder:
        return Recorder(group, write, transport(group.store, group.group_rank, group.group_size))

    torch.distributed.Backend.register_backend(_BACKEND, create, extended_api=True, devices=["cpu"])
    store = PrefixStore(str(folder), TCPStore("127.0.0.1", port, timeout=_LIMIT))
    begin = torch.distributed.init_process_group

    def init_process_group(backend: str, timeout: timedelta) -> None:
        begin(_BACKEND, store=store, rank=rank, world_size=ranks, timeout=min(timeout, _LIMIT))

    torch.distributed.init_process_group = init_process_group
    distributed_c10d.ProcessGroupGloo = None  # type: ignore[misc]  # no other group can be made
    also()


def traces(folder: Path) -> dict[int, list[Event]]:
    """What each rank has recorded; the last line of one that was killed may be incomplete."""

    def event(line: bytes) -> Event:
        values = [tuple(value) if isinstance(value, list) else value for value in json.loads(line)]
        return Event._make(values)

    files = sorted(folder.iterdir(), key=lambda file: int(file.name))
    return {int(file.name): [event(line) for line in file.read_bytes().split(b"\n")[:-1]] for file in files}


class Recorder(ProcessGroup):
    """Methods have the arguments that torch gives to its own process groups, and each several names in torch's
    versions."""

    def __init__(self, group: Any, write: Callable[[Event], None], transport: Any) -> None:
        super().__init__(group.store, group.group_rank, group.group_size)
        self.transport = transport
        self._write, self._id = write, str(group.group_id)
        self._members = tuple(group.global_ranks_in_group) or tuple(range(group.group_size))

    def allreduce(self, tensors: list[Tensor], options: Any) -> Any:
        self._note(f"all_reduce {_name(options)}", _sizes(tensors))
        return self.transport.allreduce(tensors, options.reduceOp)

    def broadcast(self, tensors: list[Tensor], options: Any) -> Any:
        self._note("broadcast", f"{_sizes(tensors)} from rank {self._members[options.rootRank]}")
        return self.transport.broadcast(tensors, options)

    def reduce(self, tensors: list[Tensor], options: Any) -> Any:
        self._note(f"reduce {_name(options)}", f"{_sizes(tensors)} to rank {self._members[options.rootRank]}")
        return self.transport.reduce(tensors, options)

    def barrier(self, opts: Any) -> Any:
        self._note("barrier", "nothing")
        return self.transport.barrier(opts)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Any:
        self._note_uneven("all_gather", inputs[0], [inputs[0]] * self.size(), outputs[0])
        return self.transport.allgather(outputs, inputs, options)

    def all_gather_single(self, output: Tensor, input: Tensor, options: Any) -> Any:
        self._note("all_gather_into_tensor", f"{_sizes([input])} to {output.numel()}")
        return self.transport._allgather_base(output, input, options)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> Any:
        kind = f"reduce_scatter {_name(options)}"
        self._note_uneven(kind, outputs[0], inputs[0], [outputs[0]] * self.size())
        return self.transport.reduce_scatter(outputs, inputs, options)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, options: Any) -> Any:
        self._note(f"reduce_scatter_tensor {_name(options)}", f"{_sizes([input])} to {output.numel()}")
        return self.transport._reduce_scatter_base(output, input, options)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> Any:
        self._note_uneven("all_to_all", inputs[0], inputs, outputs)
        return self.transport.alltoall(outputs, inputs, options)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, received: Sequence[int], sent: Sequence[int], options: Any
    ) -> Any:
        parts = _split(input, sent, self.size()), _split(output, received, self.size())
        self._note_uneven("all_to_all_single", input, *parts)
        return self.transport.alltoall_base(output, input, received, sent, options)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Any:
        self._note("send", _sizes(tensors), peer=self._members[to])
        return self.transport.send(tensors, to, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        self._note("recv", _sizes(tensors), peer=self._members[source])
        return self.transport.recv(tensors, source, tag)

    def allreduce_coalesced(self, tensors: list[Tensor], options: Any) -> Any:
        return _Together([self.allreduce([tensor], options) for tensor in tensors])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> Any:
        pairs = zip(outputs, inputs, strict=True)
        return _Together([self.all_gather_single(*pair, options) for pair in pairs])

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> Any:
        pairs = zip(outputs, inputs, strict=True)
        return _Together([self.reduce_scatter_single(*pair, options) for pair in pairs])

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def getBackendName(self) -> str:
        return _BACKEND

    def _note_uneven(self, kind: str, like: Tensor, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        numbers = [tuple(tensor.numel() for tensor in tensors) for tensors in (sent, received)]
        self._note(kind, _dtype(like), sent=numbers[0], received=numbers[1])

    def _note(self, kind: str, what: str, **more: Any) -> None:
        if self.size() > 1:
            group = f"{self.group_desc} {self._id}"
            self._write(Event(group, self._members, kind, what, _place(sys._getframe(2)), **more))


class _Together(distributed_c10d.Work):
    """Done when all are."""

    def __init__(self, works: list[Any]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = _LIMIT) -> bool:
        for work in self._works:
            work.wait()
        return True


def _name(options: Any) -> str:
    return options.reduceOp.op.name


def _sizes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tensor.numel()} x {_dtype(tensor)}" for tensor in tensors)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _split(tensor: Tensor, rows: Sequence[int], parts: int) -> Sequence[Tensor]:
    """rows: of each part, also as numpy's array; if empty, all have the same number."""
    return tensor.split([int(number) for number in rows] if len(rows) else len(tensor) // parts)


def _place(frame: FrameType | None) -> str:
    """The function of Megatron's that called, if any, and the innermost one of ours."""
    found: list[str] = []
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        ours = path.startswith(_OURS)
        if ours or ("/megatron/core/" in path and not found):
            found.append(f"{'/'.join(path.split('/')[-2:])}, {name}")
        if ours:
            break
        frame = frame.f_back
    return " in ".join(found)


# --- results without the other ranks ---


class StandIn:
    """The transport of a group whose ranks seldom wait for each other.

    What decides the program's way is exchanged: all that the whole world shares, and integers that are sent or
    gathered, such as numbers of rows and pickled objects. Otherwise each rank has what this one has.
    """

    def __init__(self, store: Store, rank: int, ranks: int) -> None:
        self._store: Any = store  # torch's type hints know no bytes
        self._rank, self._ranks = rank, ranks
        self._is_world = not torch.distributed.is_initialized()
        self._count = 0
        self._messages = [0] * ranks, [0] * ranks  # sent to and received from each

    def allreduce(self, tensors: list[Tensor], operation: Any) -> Any:
        (tensor,) = tensors
        _put(tensor, _reduced(self._everyones("all_reduce", tensor, self._is_world), operation))
        return _Together([])

    def broadcast(self, tensors: list[Tensor], options: Any) -> Any:
        (tensor,) = tensors
        if self._is_exchanged(tensor):
            _put(tensor, self._everyones("broadcast", tensor, True)[options.rootRank])
        elif options.rootRank != self._rank:
            _put(tensor, None)
        return _Together([])

    def reduce(self, tensors: list[Tensor], options: Any) -> Any:
        (tensor,) = tensors
        total = _reduced(self._everyones("reduce", tensor, self._is_world), options.reduceOp)
        if options.rootRank == self._rank:
            _put(tensor, total)
        return _Together([])

    def barrier(self, options: Any) -> Any:
        self._everyones("barrier", torch.empty(0), self._is_world)
        return _Together([])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Any:
        exchanged = self._exchange("all_gather", inputs) if self._is_exchanged(inputs[0]) else None
        for rank, output in enumerate(outputs[0]):
            _put(output, exchanged[rank][0] if exchanged else None)
        return _Together([])

    def _allgather_base(self, output: Tensor, input: Tensor, options: Any) -> Any:
        parts = self._everyones("all_gather_into_tensor", input, self._is_exchanged(input))
        _put(output, torch.cat([part.flatten() for part in parts]))
        return _Together([])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> Any:
        whole = torch.cat([part.flatten() for part in inputs[0]])
        total = _reduced(self._everyones("reduce_scatter", whole, self._is_world), options.reduceOp)
        own = total.split([part.numel() for part in inputs[0]])[self._rank]
        _put(outputs[0], own)
        return _Together([])

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, options: Any) -> Any:
        return self.reduce_scatter([output], [list(input.flatten().chunk(self._ranks))], options)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> Any:
        exchanged = self._exchange("all_to_all", inputs) if self._is_exchanged(inputs[0]) else None
        for rank, output in enumerate(outputs):
            _put(output, exchanged[rank][self._rank] if exchanged else None)
        return _Together([])

    def alltoall_base(
        self, output: Tensor, input: Tensor, received: Sequence[int], sent: Sequence[int], options: Any
    ) -> Any:
        outputs, inputs = _split(output, received, self._ranks), _split(input, sent, self._ranks)
        return self.alltoall(list(outputs), list(inputs), options)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Any:
        (tensor,) = tensors
        if self._is_exchanged(tensor):
            number = self._messages[0][to] = self._messages[0][to] + 1
            self._store.set(f"{self._rank}>{to}/{number}", pickle.dumps(tensor.detach().clone()))
        return _Together([])

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        (tensor,) = tensors
        if not self._is_exchanged(tensor):
            _put(tensor, None)
            return _Together([])
        number = self._messages[1][source] = self._messages[1][source] + 1
        return _Receive(self._store, f"{source}>{self._rank}/{number}", tensor)

    def _is_exchanged(self, tensor: Tensor) -> bool:
        return self._is_world or not tensor.is_floating_point()

    def _everyones(self, kind: str, tensor: Tensor, is_exchanged: bool) -> list[Tensor]:
        if not is_exchanged:
            return [tensor] * self._ranks
        return [tensors[0] for tensors in self._exchange(f"{kind} of {_sizes([tensor])}", [tensor])]

    def _exchange(self, what: str, tensors: list[Tensor]) -> list[list[Tensor]]:
        """`tensors` of each rank.

        Raises:
            AssertionError: the ranks do not do the same, which the traces show.
        """
        if self._ranks == 1:
            return [tensors]
        self._count += 1
        message = pickle.dumps((what, [tensor.detach().clone() for tensor in tensors]))
        self._store.set(f"{self._count}/{self._rank}", message)
        keys = [f"{self._count}/{rank}" for rank in range(self._ranks)]
        found = [pickle.loads(message) for message in self._store.multi_get(keys)]
        assert {other for other, _ in found} == {what}, f"the ranks do not do the same: {[other for other, _ in found]}"
        return [values for _, values in found]


class _Receive(distributed_c10d.Work):
    """The sender need not have sent before the receiver waits."""

    def __init__(self, store: Store, key: str, target: Tensor) -> None:
        super().__init__()
        self._finish = lambda: _put(target, pickle.loads(store.get(key)))

    def wait(self, timeout: timedelta = _LIMIT) -> bool:
        self._finish()
        return True


@torch.no_grad()
def _put(target: Tensor, value: Tensor | None) -> None:
    """None: what another rank would have sent."""
    target.fill_(_STAND_IN) if value is None else target.copy_(value.view_as(target))


def _reduced(tensors: list[Tensor], operation: Any) -> Tensor:
    functions: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
        ReduceOp.SUM: torch.add,
        ReduceOp.AVG: torch.add,
        ReduceOp.MAX: torch.maximum,
        ReduceOp.MIN: torch.minimum,
    }
    total = reduce(functions[operation.op], tensors)
    return total / len(tensors) if operation == ReduceOp.AVG else total


def gloo(store: Store, rank: int, ranks: int) -> ProcessGroupGloo:
    return ProcessGroupGloo(store, rank, ranks, timeout=_LIMIT)


# --- comparing ---


def first_difference(traces: dict[int, list[Event]]) -> str | None:
    """Where the ranks first do not do the same, and what each does there; None if they always do."""
    found = [*_of_collectives(traces), *_of_messages(traces)]
    return min(found)[-1] if found else None


_Column = dict[int, tuple[int, Event] | None]  # of each rank its next event of one kind, with its place in the trace
_Difference = tuple[bool, int, str]  # whether a rank has only ended, place in the trace, description


def _of_collectives(traces: dict[int, list[Event]]) -> Iterator[_Difference]:
    groups = {(event.group, event.members) for events in traces.values() for event in events}
    for group, members in sorted(groups):

        def is_in(event: Event, group: tuple[str, tuple[int, ...]] = (group, members)) -> bool:
            return event.peer is None and (event.group, event.members) == group

        columns = _columns({rank: _filtered(traces[rank], is_in) for rank in members})
        yield from _first(f"group {group} of ranks {list(members)}, collective", columns, _alike)


def _of_messages(traces: dict[int, list[Event]]) -> Iterator[_Difference]:
    def ends(rank: int, event: Event) -> tuple[str, int, int] | None:
        """(group, from, to)"""
        if event.peer is None:
            return None
        return (event.group, rank, event.peer) if event.kind == "send" else (event.group, event.peer, rank)

    pairs = {ends(rank, event) for rank, events in traces.items() for event in events} - {None}
    for pair in sorted(filter(None, pairs)):
        group, source, target = pair
        found = {
            rank: _filtered(traces[rank], lambda e, rank=rank, pair=pair: ends(rank, e) == pair)  # type: ignore[misc]
            for rank in (source, target)
        }
        yield from _first(f"group {group}, message from rank {source} to rank {target}", _columns(found), _same_size)


def _filtered(events: list[Event], wanted: Callable[[Event], bool]) -> list[tuple[int, Event]]:
    return [(place, event) for place, event in enumerate(events) if wanted(event)]


def _columns(series: dict[int, list[tuple[int, Event]]]) -> Iterator[_Column]:
    for entries in zip_longest(*series.values()):
        yield dict(zip(series, entries, strict=True))


def _first(where: str, columns: Iterator[_Column], fits: Callable[[list[Event]], bool]) -> Iterator[_Difference]:
    for number, column in enumerate(columns, 1):
        there = [entry for entry in column.values() if entry]
        events = [event for _, event in there]
        if len(there) == len(column) and fits(events):
            continue
        does = {rank: str(entry[1]) if entry else "nothing more" for rank, entry in column.items()}
        lines = [f"{where} {number}:"]
        for what, same in groupby(sorted(does, key=lambda rank: does[rank]), key=lambda rank: does[rank]):
            ranks = [str(rank) for rank in same]
            lines.append(f"  {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(ranks)}: {what}")
        yield fits(events), min(place for place, _ in there), "\n".join(lines)
        return


def _alike(events: list[Event]) -> bool:
    """The splits are compared only if all members are there."""
    if not _same_size(events) or len({event.kind for event in events}) > 1:
        return False
    members = range(len(events[0].sent))
    if len(events) < len(members):
        return True
    return all(events[i].sent[j] == events[j].received[i] for i in members for j in members)


def _same_size(events: list[Event]) -> bool:
    return len({event.what for event in events}) == 1
