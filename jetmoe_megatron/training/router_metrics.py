"""What all routers did since the last record, summed over steps and ranks.

Letters: R this rank's routers, L layers of the model, E experts; V the numbers of a router: E loads, then `_SUMS`.
"""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from jetmoe_megatron.config.schema import Run
from jetmoe_megatron.model.router import Router, routers
from jetmoe_megatron.monitor.monitor import Record
from jetmoe_megatron.monitor.routers import KINDS, RouterMetrics, line, summary
from jetmoe_megatron.runtime.device import device

_SUMS = ("gate_entropy", "top1_margin", "balance_loss", "z_loss", "micro_batches")


class RouterSums:
    """Sums on the device: nothing waits for it, and ranks exchange nothing until `reduce`."""

    def __init__(self, run: Run, model: list[DistributedDataParallel]) -> None:
        self._every, self._model, self._routers = run.logging.router_every_steps, run.model, list(routers(model))
        self._steps = 0
        self._sum_RV = torch.zeros(
            len(self._routers), run.model.num_experts + len(_SUMS), dtype=torch.float64, device=device()
        )

    def add_step(self) -> None:
        """After a step, before the routers' records are reset."""
        self._steps += 1
        if self._routers:
            self._sum_RV += torch.stack([_numbers(router) for router in self._routers])

    def is_due(self, step: int, last: bool) -> bool:
        """Whether to reduce after `step` steps. last: of this start."""
        return self._every > 0 and (last or step % self._every == 0)

    def record(self, step: int, tokens: int) -> Record:
        """After `step` steps: a summary, and as `routers` the line of routers.jsonl. All ranks call it."""
        metrics = self.reduce()
        return {**summary(metrics), "routers": line(step, tokens, metrics)}

    def reduce(self) -> dict[str, RouterMetrics]:
        """By kind, the same on all ranks. One collective. The next sums begin at zero."""
        layers, kinds = self._model.num_layers, len(KINDS)
        sum_KLV = torch.zeros(kinds, layers, self._sum_RV.shape[1], dtype=torch.float64, device=device())
        for router, sum_V in zip(self._routers, self._sum_RV, strict=True):
            sum_KLV[KINDS.index(router.kind), router.layer_number - 1] = sum_V
        torch.distributed.all_reduce(sum_KLV)
        metrics = {
            kind: RouterMetrics.of(
                self._steps,
                self._model.top_k,
                [row[: self._model.num_experts] for row in sum_LV],
                *zip(*(row[self._model.num_experts :] for row in sum_LV), strict=True),
            )
            for kind, sum_LV in zip(KINDS, sum_KLV.tolist(), strict=True)
        }
        self._sum_RV.zero_()
        self._steps = 0
        return metrics


def _numbers(router: Router) -> Tensor:
    """[V] of this rank's share of a step."""
    record = router.record
    sums = [torch.as_tensor(getattr(record, name), dtype=torch.float64, device=device()) for name in _SUMS]
    return torch.cat([torch.as_tensor(record.load_E, device=device()).double(), torch.stack(sums)])
