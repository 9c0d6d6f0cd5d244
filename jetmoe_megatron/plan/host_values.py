"""Tensors without numbers have none for the host to read. This follows the few integers that it does read.

They are counts of rows, and sums, slices and other small results of them. The counts begin in two operations, which
`Routing` answers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.weak import WeakIdKeyDictionary

from jetmoe_megatron.plan.routing import Routing

aten = torch.ops.aten
_LONGEST = 2**13  # numbers of a tensor that are followed


class HostValues:
    def __init__(self, routing: Routing) -> None:
        self._routing = routing
        self._known: Any = WeakIdKeyDictionary()

    def of(self, tensor: Tensor) -> Tensor | None:
        """Its numbers, on the CPU; None if they are not known."""
        return tensor if tensor.device.type == "cpu" else self._known.get(tensor)

    def put(self, tensor: Tensor, value: Tensor) -> None:
        self._known[tensor] = value.to(tensor.dtype)

    def follow(self, function: Any, arguments: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        """After an operation: its result's numbers, if they are few and follow from known ones."""
        results = [result] if isinstance(result, Tensor) else result if isinstance(result, tuple | list) else []
        if not results or not all(isinstance(x, Tensor) and _is_followed(x) for x in results):
            return
        counted = self._counted(function, arguments)
        if counted is not None:
            self.put(results[0], counted)
            return
        values = self.computed(function, arguments, named)
        if values is not None:
            for tensor, value in zip(results, [values] if isinstance(values, Tensor) else values, strict=True):
                self.put(tensor, value)

    def computed(self, function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """The operation on the numbers of its arguments; None if some of them are not known."""
        tensors = [x for x in tree_flatten((arguments, named))[0] if isinstance(x, Tensor)]
        if any(self.of(x) is None for x in tensors):
            return None
        known, more = tree_map_only(Tensor, self.of, (arguments, named))
        if "device" in more:
            more = {**more, "device": torch.device("cpu")}
        return function(*known, **more)

    def _counted(self, function: Any, arguments: tuple[Any, ...]) -> Tensor | None:
        """Where counts begin: sorted choices of experts are searched, or a map of the choices is summed over tokens."""
        if function is aten.searchsorted.Tensor:
            rows, experts = arguments[0].numel(), arguments[1].numel()
            return torch.tensor(self._routing.counts(rows, experts)).cumsum(0)
        if function is aten.sum.dim_IntList and _is_map(arguments[0], self._routing.experts) and arguments[1] == [0]:
            rows, experts = arguments[0].shape[0] * self._routing.top_k, arguments[0].shape[1]
            return torch.tensor(self._routing.counts(rows, experts))
        return None

    def chosen(self, mask: Tensor) -> int:
        """How many entries of a map of the choices, or of its transpose, are true."""
        return mask.numel() * self._routing.top_k // self._routing.experts


def _is_followed(x: Tensor) -> bool:
    return not x.dtype.is_floating_point and x.numel() <= _LONGEST


def _is_map(x: Tensor, experts: int) -> bool:
    return x.dtype == torch.bool and x.dim() == 2 and x.shape[1] == experts
