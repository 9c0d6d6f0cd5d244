"""A transport for process groups whose ranks seldom wait for each other: it computes most results alone."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp, Store, Work

LIMIT = timedelta(seconds=60)  # that a rank waits for another one
_RECEIVED = 0.01  # each number of a tensor that another rank should have sent


class StandIn:
    """The transport of one group, with the methods of `ProcessGroupGloo`.

    What decides the program's way is exchanged: everything among the whole world, and integers that are sent or
    gathered, such as numbers of rows and pickled objects. Of other tensors, all ranks have what this one has, or they
    send one and the same number.
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
        return Together([])

    def broadcast(self, tensors: list[Tensor], options: Any) -> Any:
        (tensor,) = tensors
        if self._is_exchanged(tensor):
            _put(tensor, self._everyones("broadcast", tensor, True)[options.rootRank])
        elif options.rootRank != self._rank:
            _put(tensor, None)
        return Together([])

    def reduce(self, tensors: list[Tensor], options: Any) -> Any:
        (tensor,) = tensors
        total = _reduced(self._everyones("reduce", tensor, self._is_world), options.reduceOp)
        if options.rootRank == self._rank:
            _put(tensor, total)
        return Together([])

    def barrier(self, options: Any) -> Any:
        self._everyones("barrier", torch.empty(0), self._is_world)
        return Together([])

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Any:
        exchanged = self._exchange("all_gather", inputs) if self._is_exchanged(inputs[0]) else None
        for rank, output in enumerate(outputs[0]):
            _put(output, exchanged[rank][0] if exchanged else None)
        return Together([])

    def _allgather_base(self, output: Tensor, input: Tensor, options: Any) -> Any:
        parts = self._everyones("all_gather_into_tensor", input, self._is_exchanged(input))
        _put(output, torch.cat([part.flatten() for part in parts]))
        return Together([])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> Any:
        whole = torch.cat([part.flatten() for part in inputs[0]])
        total = _reduced(self._everyones("reduce_scatter", whole, self._is_world), options.reduceOp)
        own = total.split([part.numel() for part in inputs[0]])[self._rank]
        _put(outputs[0], own)
        return Together([])

    def _reduce_scatter_base(self, output: Tensor, input: Tensor, options: Any) -> Any:
        return self.reduce_scatter([output], [list(input.flatten().chunk(self._ranks))], options)

    def alltoall(self, outputs: list[Tensor], inputs: list[Tensor], options: Any) -> Any:
        exchanged = self._exchange("all_to_all", inputs) if self._is_exchanged(inputs[0]) else None
        for rank, output in enumerate(outputs):
            _put(output, exchanged[rank][self._rank] if exchanged else None)
        return Together([])

    def alltoall_base(
        self, output: Tensor, input: Tensor, received: Sequence[int], sent: Sequence[int], options: Any
    ) -> Any:
        outputs, inputs = split(output, received, self._ranks), split(input, sent, self._ranks)
        return self.alltoall(list(outputs), list(inputs), options)

    def gather(self, outputs: list[list[Tensor]], inputs: list[Tensor], options: Any) -> Any:
        exchanged = self._exchange("gather", inputs) if self._is_exchanged(inputs[0]) else None
        for rank, output in enumerate(outputs[0] if options.rootRank == self._rank else []):
            _put(output, exchanged[rank][0] if exchanged else None)
        return Together([])

    def scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], options: Any) -> Any:
        own = inputs[0] if options.rootRank == self._rank else []
        exchanged = self._exchange("scatter", own)[options.rootRank] if self._is_exchanged(outputs[0]) else own
        _put(outputs[0], exchanged[self._rank] if exchanged else None)
        return Together([])

    def send(self, tensors: list[Tensor], to: int, tag: int) -> Any:
        (tensor,) = tensors
        if self._is_exchanged(tensor):
            number = self._messages[0][to] = self._messages[0][to] + 1
            self._store.set(f"{self._rank}>{to}/{number}", pickle.dumps(tensor.detach().clone()))
        return Together([])

    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Any:
        (tensor,) = tensors
        if not self._is_exchanged(tensor):
            _put(tensor, None)
            return Together([])
        number = self._messages[1][source] = self._messages[1][source] + 1
        return _Receive(self._store, f"{source}>{self._rank}/{number}", tensor)

    def _is_exchanged(self, tensor: Tensor) -> bool:
        return self._is_world or not tensor.is_floating_point()

    def _everyones(self, kind: str, tensor: Tensor, is_exchanged: bool) -> list[Tensor]:
        if not is_exchanged:
            return [tensor] * self._ranks
        return [tensors[0] for tensors in self._exchange(f"{kind} of {sizes([tensor])}", [tensor])]

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


class _Receive(Work):
    """The sender need not have sent before the receiver waits."""

    def __init__(self, store: Store, key: str, target: Tensor) -> None:
        super().__init__()
        self._finish = lambda: _put(target, pickle.loads(store.get(key)))

    def wait(self, timeout: timedelta = LIMIT) -> bool:
        self._finish()
        return True


@torch.no_grad()
def _put(target: Tensor, value: Tensor | None) -> None:
    """None: what another rank would have sent."""
    target.fill_(_RECEIVED) if value is None else target.copy_(value.view_as(target))


def _reduced(tensors: list[Tensor], operation: Any) -> Tensor:
    functions: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
        ReduceOp.SUM: torch.add,
        ReduceOp.AVG: torch.add,
        ReduceOp.MAX: torch.maximum,
        ReduceOp.MIN: torch.minimum,
    }
    total = reduce(functions[operation.op], tensors)
    return total / len(tensors) if operation == ReduceOp.AVG else total


class Together(Work):
    """Done when all of these are."""

    def __init__(self, works: list[Any]) -> None:
        super().__init__()
        self._works = works

    def wait(self, timeout: timedelta = LIMIT) -> bool:
        for work in self._works:
            work.wait()
        return True


def sizes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(f"{tensor.numel()} x {dtype(tensor)}" for tensor in tensors)


def dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def split(tensor: Tensor, rows: Sequence[int], parts: int) -> Sequence[Tensor]:
    """rows: of each part, also as numpy's array; if empty, all have the same number."""
    return tensor.split([int(number) for number in rows] if len(rows) else len(tensor) // parts)
