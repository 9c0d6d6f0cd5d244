"""The gradient of experts' weights, computed later than the gradient of their rows: while other rows are exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DelayedGradient:
    """Of one weight. Each backward pass leaves work for one call of `compute`, in the same order.

    Megatron's DDP puts the gradient where it belongs with the hooks that it registers: the weight is no part of the
    graph (distributed_data_parallel.py, `_make_backward_post_hook`).
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.hooks = weight, list[Callable[[], None]]()
        weight.skip_backward_post_hook = True  # type: ignore[attr-defined]
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # output, weight, gradient of the output

    def apply(self, linear: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        """`linear(x, weight)`."""
        return _WithoutWeight.apply(x, linear, self)

    def wait_for_compute(self, y: Tensor, weight: Tensor, dy: Tensor) -> None:
        self._waiting.append((y, weight, dy))

    def compute(self) -> None:
        y, weight, dy = self._waiting.pop(0)
        (gradient,) = torch.autograd.grad(y, weight, dy)
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad + gradient
        for hook in self.hooks:
            hook()


class _WithoutWeight(torch.autograd.Function):
    """Its backward pass goes through the graph of `linear` to `x` only, and leaves the way to the weight for later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Callable[[Tensor, Tensor], Tensor], later: DelayedGradient) -> Tensor:
        with torch.enable_grad():
            own, weight = x.detach().requires_grad_(), later.weight.detach().requires_grad_()
            y = linear(own, weight)
        ctx.graph, ctx.later = (own, weight, y), later
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor, None, None]:
        (own, weight, y), ctx.graph = ctx.graph, None
        (dx,) = torch.autograd.grad(y, own, dy[0], retain_graph=True)
        ctx.later.wait_for_compute(y, weight, dy[0])
        return dx, None, None
