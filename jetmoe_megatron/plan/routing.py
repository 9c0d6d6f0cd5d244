"""How many rows each expert gets, as nobody knows it before training."""

from __future__ import annotations

from dataclasses import dataclass

from jetmoe_megatron.errors import UserError


@dataclass(frozen=True)
class Routing:
    """The same in each layer, micro-batch and rank: the first expert is the fullest, the others share the rest evenly.

    imbalance: rows of the fullest expert, divided by the mean over experts; at least 1.
    """

    experts: int
    top_k: int
    imbalance: float = 1.0

    def __post_init__(self) -> None:
        most = self.experts / self.top_k  # a token chooses an expert once
        if not 1.0 <= self.imbalance <= most:
            raise UserError(f"imbalance: must be from 1 to {most:g} (num_experts / top_k), not {self.imbalance:g}")

    def counts(self, rows: int, experts: int) -> list[int]:
        """Rows of each of `experts` experts; they add up to `rows`."""
        if self.imbalance == 1.0 or experts == 1:
            return _evenly(rows, experts)
        first = min(rows, round(self.imbalance * rows / experts))
        return [first, *_evenly(rows - first, experts - 1)]


def _evenly(rows: int, experts: int) -> list[int]:
    each, more = divmod(rows, experts)
    return [each + (expert < more) for expert in range(experts)]
