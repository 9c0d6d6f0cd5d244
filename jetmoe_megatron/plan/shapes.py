"""What an operation returns for arguments of the same shapes as before, without asking torch again.

torch works out the shape of a result in Python, which takes longer than all else in a rehearsal. A step asks for the
same few thousand results again and again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jetmoe_megatron.plan.fake_world import NOWHERE

_Shape = tuple[torch.Size, tuple[int, ...], torch.dtype]
_UNKNOWN: Any = object()


class Shapes:
    """Of operations that are no views: those whose results are new tensors, without numbers."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[_Shape, ...] | None] = {}
        self._makes_new: dict[Any, bool] = {}

    def result(self, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """That of the operation."""
        if not self._makes_new.setdefault(function, _makes_new(function)):
            return function(*arguments, **named)
        key = function, _key(arguments), _key(named)
        known = self._known.get(key, _UNKNOWN)
        if known is _UNKNOWN or known is None:
            result = function(*arguments, **named)
            if known is _UNKNOWN:
                self._known[key] = _shapes(result)
            return result
        made = [torch.empty_strided(size, stride, dtype=dtype, device=NOWHERE) for size, stride, dtype in known]
        return made[0] if len(made) == 1 else tuple(made)


def _makes_new(function: Any) -> bool:
    schema = function._schema
    aliases = any(argument.alias_info for argument in [*schema.arguments, *schema.returns])
    takes_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
    returns_tensors = all(str(one.type) == "Tensor" for one in schema.returns)
    return takes_tensors and returns_tensors and not aliases


def _key(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.device
    if isinstance(x, tuple | list):
        return tuple(map(_key, x))
    if isinstance(x, dict):
        return tuple((name, _key(value)) for name, value in x.items())
    return type(x), x


def _shapes(result: Any) -> tuple[_Shape, ...] | None:
    results = [result] if isinstance(result, Tensor) else list(result)
    if any(x is None or x.device != NOWHERE for x in results):
        return None
    return tuple((x.shape, x.stride(), x.dtype) for x in results)
