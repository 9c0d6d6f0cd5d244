"""Records what a rank that runs the real program does on its process groups.

Each of them is a `Recorder`, a process group in Python: nothing reaches its transport without being recorded, and torch
refuses what it does not define. The transport is gloo, or a `StandIn`.
"""

# The arguments of a process group's methods have other types in each version of torch.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, ProcessGroupGloo, Store, TCPStore, distributed_c10d

import jetmoe_megatron
from tests.parallel.collectives import Event
from tests.parallel.stand_in import LIMIT, Together, dtype, sizes, split

_BACKEND = "recorder"
_OURS = f"{Path(jetmoe_megatron.__file__).parent}/"
Transport = Callable[[Store, int, int], Any]  # of store, rank and number of ranks of a group


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
    store = PrefixStore(str(folder), TCPStore("127.0.0.1", port, timeout=LIMIT))
    begin = torch.distributed.init_process_group

    def init_process_group(backend: str, timeout: timedelta, **meeting: Any) -> None:
        begin(_BACKEND, store=store, rank=rank, world_size=ranks, timeout=min(timeout, LIMIT))

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
    """torch's wrappers call these methods of a process group; their names differ between versions of torch."""

    def __init__(self, group: Any, write: Callable[[Event], None], transport: Any) -> None:
        super().__init__(group.group_rank, group.group_size)  # type: ignore[call-arg]  # the one for subclasses
        self.transport = transport
        self._write, self._id = write, str(group.group_id)
        self._members = tuple(group.global_ranks_in_group) or tuple(range(group.group_size))

    def allreduce(self, tensors: list[Tensor], options: Any) -> Any:
        self._note(f"all_reduce {_name(options)}", sizes(tensors))
        return self.transport.allreduce(tensors, options.reduceOp)

    def broadcast(self, tensors: list[Tensor], options: Any) -> Any:
        self._note("broadcast", f"{sizes(tensors)} from rank {self._members[options.rootRank]}")
        return self.transport.broadcast(tensors, options)

    def reduce(self, tensors: list[Tensor], options: Any) -> Any:
        self._note(f"reduce {_name(options)}", f"{sizes(tensors)} to rank {self._members[options.rootRank]}")
        return self.transport.reduce(tensors, options)

    def barrier(self, opts: Any) -> Any:
        self._note("barrier", "nothing")
        return self.transport.barrier(opts)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Any:
        self._note_uneven("all_gather", inputs[0], [inputs[0]] * self.size(), outputs[0])
        return self.transport.allgather(outputs, inputs, options)

    def all_gather_single(self, output: Tensor, input: Tensor, options: Any) -> Any:
        self._note("all_gather_into_tensor", f"{sizes([input])} to {output.numel()}")
        return self.transport._allgather_base(output, input, options)

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> Any:
        kind = f"reduce_scatter {_name(options)}"
        self._note_uneven(kind, outputs[0], inputs[0], [outputs[0]] * self.size())
        return self.transport.reduce_scatter(outputs, inputs, options)

    def reduce_scatter_single(self, output: Tensor, input: Tensor, options: Any) -> Any:
        self._note(f"reduce_scatter_tensor {_name(options)}", f"{sizes([input])} to {output.numel()}")
        return self.transport._reduce_scatter_base(output, input, options)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> Any:
        self._note_uneven("all_to_all", inputs[0], inputs, outputs)
        return self.transport.alltoall(outputs, inputs, options)

    def all_to_all_single(
        self, output: Tensor, input: Tensor, received: Sequence[int], sent: Sequence[int], options: Any
    ) -> Any:
        parts = split(input, sent, self.size()), split(output, received, self.size())
        self._note_uneven("all_to_all_single", input, *parts)
        return self.transport.alltoall_base(output, input, received, sent, options)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Any:
        self._note("gather", f"{sizes(inputs)} to rank {self._members[options.rootRank]}")
        return self.transport.gather(outputs, inputs, options)

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> Any:
        self._note("scatter", f"{sizes(outputs)} from rank {self._members[options.rootRank]}")
        return self.transport.scatter(outputs, inputs, options)

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Any:
        self._note("send", sizes(tensors), peer=self._members[to])
        return self.transport.send(tensors, to, tag)

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        self._note("recv", sizes(tensors), peer=self._members[source])
        return self.transport.recv(tensors, source, tag)

    def allreduce_coalesced(self, tensors: list[Tensor], options: Any) -> Any:
        return Together([self.allreduce([tensor], options) for tensor in tensors])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> Any:
        pairs = zip(outputs, inputs, strict=True)
        return Together([self.all_gather_single(*pair, options) for pair in pairs])

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> Any:
        pairs = zip(outputs, inputs, strict=True)
        return Together([self.reduce_scatter_single(*pair, options) for pair in pairs])

    _allgather_base = all_gather_single
    _reduce_scatter_base = reduce_scatter_single
    alltoall_base = all_to_all_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def getBackendName(self) -> str:
        return _BACKEND

    def _note_uneven(self, kind: str, like: Tensor, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        numbers = [tuple(tensor.numel() for tensor in tensors) for tensors in (sent, received)]
        self._note(kind, dtype(like), sent=numbers[0], received=numbers[1])

    def _note(self, kind: str, what: str, **more: Any) -> None:
        if self.size() > 1:
            group = f"{self.group_desc} {self._id}"
            self._write(Event(group, self._members, kind, what, _place(sys._getframe(2)), **more))


def _name(options: Any) -> str:
    return options.reduceOp.op.name


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


def gloo(store: Store, rank: int, ranks: int) -> ProcessGroupGloo:
    return ProcessGroupGloo(store, rank, ranks, timeout=LIMIT)
