"""Norms of the gradients by part of the model, of the weights, and of what a step changed in them.

Each number of the model counts once: not the copies on tensor-parallel ranks, nor the tied embedding on the last stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from jetmoe_megatron.checkpoint.optimizer_state import main_weights
from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.runtime.device import device
from jetmoe_megatron.training.gradient_clipping import norm

PARTS = ("embedding", "moa", "moe", "routers", "norms")
# Of a weight, its group and its state: numbers, and a factor for them.
_Value = Callable[[Tensor, dict[str, Any], dict[str, Any]], tuple[Tensor, float] | None]


class Norms:
    """All ranks call its functions, which exchange one vector for each of Megatron's optimizers."""

    def __init__(self, model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
        part_of = {id(p): part_of_model(name) for chunk in model for name, p in chunk.named_parameters()}
        self._weights = [(one, list(_counted(one, part_of))) for one in optimizer.chained_optimizers]

    def of_gradients(self) -> Record:
        """`grad_norm/<part>`, before clipping: to be called after `compute_gradients`."""
        squares = self._squares(lambda main, group, state: None if main.grad is None else (main.grad, 1.0))
        return {f"grad_norm/{part}": math.sqrt(square) for part, square in squares.items()}

    def of_update(self) -> Record:
        """`param_norm` and `update_norm`, what the step added to the weights: to be called after `update_weights`."""
        weights, updates = self._squares(lambda main, group, state: (main, 1.0)), self._squares(_update)
        return {
            "param_norm": math.sqrt(sum(weights.values())),
            "update_norm": math.sqrt(sum(updates.values())),
        }

    @torch.no_grad()
    def _squares(self, value: _Value) -> dict[str, float]:
        total = torch.zeros(len(PARTS), dtype=torch.float64, device=device())
        for optimizer, weights in self._weights:
            own = torch.zeros_like(total)
            for main, part, group in weights:
                if found := value(main, group, optimizer.optimizer.state[main]):
                    x, factor = found
                    own[part] += (factor * norm([x]).double()).square()
            torch.distributed.all_reduce(own, group=optimizer.get_grad_stats_parallel_group())
            total += own
        return dict(zip(PARTS, total.tolist(), strict=True))


def part_of_model(name: str) -> int:
    """The part in `PARTS` of a parameter."""
    parts = {"router.": "routers", "norm": "norms", "self_attention.": "moa", "mlp.": "moe"}
    return PARTS.index(next((part for word, part in parts.items() if word in name), "embedding"))


def _counted(optimizer: Any, part_of: dict[int, int]) -> Iterator[tuple[Tensor, int, dict[str, Any]]]:
    """(weight that is stepped on, its part, its group), as `MegatronOptimizer.get_main_grads_for_grad_norm` counts."""
    part_of_main = {id(main): part_of[id(parameter)] for parameter, main in main_weights(optimizer)}
    for group in optimizer.optimizer.param_groups:
        for main in group["params"]:
            if param_is_not_shared(main) and param_is_not_tensor_parallel_duplicate(main):
                yield main, part_of_main[id(main)], group


def _update(main: Tensor, group: dict[str, Any], state: dict[str, Any]) -> tuple[Tensor, float] | None:
    """What the step just made has added, from AdamW's formula backwards, without a copy of the weights before:

    a = lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
    after = (1 - lr * decay) * before - a
    """
    if "exp_avg" not in state or not group["lr"]:
        return None
    beta1, beta2 = group["betas"]
    steps = float(state.get("step", group.get("step", 0)))
    root_of_bias = math.sqrt(1 - beta2**steps)
    factor, decay = group["lr"] * root_of_bias / (1 - beta1**steps), group["lr"] * group["weight_decay"]
    a = state["exp_avg"] / state["exp_avg_sq"].sqrt().add_(group["eps"] * root_of_bias)
    factor /= 1 - decay
    return a.add_(main, alpha=decay / (1 - decay) / factor), factor
